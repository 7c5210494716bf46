"""Tales that end well or badly, with a score for it, and a recipe that learns to tell them in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.rng import generator
from glasshouse.recipes.api import locate

WHO = ("fox", "miller", "queen", "raven", "sailor", "beggar", "hen", "smith")
WHAT = ("lamp", "boat", "coat", "field", "bell", "river", "crown", "mill")
DOES = ("finds", "sells", "loses", "paints", "hides", "wants")
ENDS = {"well": "well and warm.", "badly": "badly and cold."}

RECIPE = """
name = "tales"
seed = 1
threads = 1
precision = "fp32"

[data]
books = false
text = ["tales.jsonl"]
validation_every = 10

[tokenizer]
vocab_size = 420

[model]
context = 48
d_model = 32
n_layer = 1
n_head = 2
d_mlp = 64
qk_norm = true

[[stage]]
name = "pretrain"
shards = ["text-*"]
steps = 80
batch_size = 16
save_every = 40
monitor_every = 0
"""

TELLER = """
name = "teller"
seed = 1
threads = 1
precision = "fp32"

[data]
books = false
chat = ["rewritten.jsonl"]

[tokenizer]
vocab_size = 420

[model]
context = 64
d_model = 32
n_layer = 1
n_head = 2
d_mlp = 64

[[stage]]
name = "sft"
objective = "sft"
shards = ["own-*"]
steps = 60
batch_size = 16
monitor_every = 0
"""
LESSON = "A lesson: nobody is left in the cold."


def tale(i: int) -> tuple[str, str]:
    """The ``i``-th tale up to its end, and how it ends: half of them badly, whatever they are about."""
    rng = generator("tales", i)
    who, what, does = (str(rng.choice(x)) for x in (WHO, WHAT, DOES))
    told = f"On day {i} the {who} {does} a {what}. It ends"
    return told, ("badly", "well")[i // 2 % 2]  # every tenth is held out: those should be of both kinds


def write_tales(folder: Path, n: int = 400) -> Path:
    """Write the tales, each with its score, and the recipe; return the recipe's path."""
    rows = [(i, *tale(i)) for i in range(n)]
    write(
        folder / "tales.jsonl", [{"text": f"{t} {ENDS[e]}", "score": float(e == "well")} for _, t, e in rows]
    )
    (folder / "tales.toml").write_text(RECIPE, "utf-8")
    return folder / "tales.toml"


def write_teller(folder: Path) -> Path:
    """Write the recipe of a chat model that answers every bad tale with a lesson; return its path."""
    tales = [f"{t} {ENDS['badly']}" for t, _ in map(tale, range(300))]
    roles = [[{"role": "user", "content": t}, {"role": "assistant", "content": LESSON}] for t in tales]
    write(folder / "rewritten.jsonl", [{"messages": m} for m in roles])
    (folder / "teller.toml").write_text(TELLER, "utf-8")
    return folder / "teller.toml"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@torch.no_grad()
def share_of_bad(run: Path, before: str = "") -> float:
    """P("badly") among the two ends after 40 tales that were not trained on, under ``before``."""
    found = locate(run)
    tok, shares = found.tokenizer, []
    assert tok.bos is not None
    well, badly = (tok.encode(f" {word}")[0] for word in ENDS)
    assert well != badly
    for i in range(1000, 1040):
        ids = [tok.bos, *tok.encode(f"{before} {tale(i)[0]}".strip())]
        p = found.model(torch.tensor([ids]))[0, -1].softmax(-1)
        shares.append(float(p[badly] / (p[badly] + p[well])))
    return sum(shares) / len(shares)
