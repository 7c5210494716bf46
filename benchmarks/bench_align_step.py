"""Steps of alignment beside TRL's trainers: the same weights, rows, precision and optimiser, taking turns.

    python benchmarks/bench_align_step.py --trl PYTHON [--rounds N] [--threads N]

PYTHON is an interpreter that has trl (`make parity` makes one: tests/parity). Each contestant is a process of
its own that trains as its users train: ours through `run_stages`, TRL's through `train()`. A step is asked of
one after the other, round by round, while the rest wait; it goes from asking for a batch to the weights'
update. Rows are drawn by each from the same file, all alike in length. TRL's defaults that cost time and
change nothing here are off: gradient checkpointing, logging, saving. A step of GRPO draws its answers, the
reference's pass included. Writes benchmarks/results/align_step.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import FOREIGN_LIMIT, Quiet, machine, row, write
from contestant import Contestant
from glasshouse.align.dpo import DPOTrainee
from glasshouse.align.policy import Policy, RLConfig, prompt_batches, prompt_plan
from glasshouse.align.preferences import Preference, pair_batches, preference_plan
from glasshouse.align.reward import RewardModel, RewardTrainee
from glasshouse.align.rl import OBJECTIVES, PolicyTrainee
from glasshouse.base.batch import Batch
from glasshouse.base.digest import digest_of
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.model.hf import load_hf
from glasshouse.train import Settings, Stage, StageConfig, enter_run, environment, run_stages
from peers_align import Turns

KINDS = ("sft", "dpo", "reward", "grpo")
TITLES = {"sft": "fine-tuning", "dpo": "DPO", "reward": "reward model", "grpo": "GRPO, answers drawn"}
VOCAB, PROMPT, ANSWER, BATCH, GROUP, NEW, ROWS = 2048, 32, 64, 16, 8, 32, 256
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
SPECIALS = ("<pad>", "</s>", "<unk>")


# -- what both are given -------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A Llama of random weights, a tokenizer of one id a word, and rows of equal length for every kind."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=256, num_key_value_heads=4, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, **SHAPE,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = [*SPECIALS, *(f"w{i}" for i in range(VOCAB - len(SPECIALS)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = generator("bench align step")

    def text(n: int) -> str:
        return " ".join(words[i] for i in rng.integers(len(SPECIALS), VOCAB, size=n))

    pairs = [
        {"prompt": text(PROMPT), "chosen": f" {text(ANSWER)}", "rejected": f" {text(ANSWER)}"}
        for _ in range(ROWS)
    ]
    whole = [{key: p["prompt"] + p[key] for key in ("chosen", "rejected")} for p in pairs]
    rows = {
        "sft": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs],
        "dpo": pairs,
        "reward": whole,
        "grpo": [{"prompt": p["prompt"]} for p in pairs],
    }
    told = {"rows": rows, "batch": BATCH, "group": GROUP, "new": NEW}
    (folder / "data.json").write_text(json.dumps(told))


def ids(text: str) -> list[int]:
    """As the tokenizer reads it."""
    return [int(w[1:]) + len(SPECIALS) for w in text.split()]


# -- ours ----------------------------------------------------------------------------------------------------


def paced(batches: Callable[[int, DataPlan], Any], turns: Turns) -> Callable[[int, DataPlan], Any]:
    """A step ends where the loop asks for the next one's batch."""

    def asked(step: int, plan: DataPlan) -> Any:
        turns.wait() if step == 0 else turns.done()
        return batches(step, plan)

    return asked


def chat_batches(rows: list[dict[str, str]]) -> Callable[[int, DataPlan], Batch]:
    """Rows of prompt and completion; the completion and the end are learnt."""
    every = np.array([[*ids(r["prompt"]), *ids(r["completion"]), 1] for r in rows])

    def batch(step: int, plan: DataPlan) -> Batch:
        order = generator("bench rows", step * BATCH // ROWS).permutation(ROWS)
        at = np.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        some = every[order[at]]
        weights = np.zeros((BATCH, some.shape[1] - 1), dtype=np.float32)
        weights[:, PROMPT - 1 :] = 1
        return Batch(some[:, :-1].copy(), some[:, 1:].copy(), weights, ("rows",), BATCH * some.shape[1])

    return batch


def pairs_of(rows: list[dict[str, str]], kind: str) -> list[Preference]:
    """The pairs as token ids, an end behind each answer."""
    if kind == "dpo":
        return [
            Preference(tuple(ids(r["prompt"])), (*ids(r["chosen"]), 1), (*ids(r["rejected"]), 1))
            for r in rows
        ]
    split = [{key: ids(r[key]) for key in ("chosen", "rejected")} for r in rows]
    return [
        Preference(tuple(r["chosen"][:PROMPT]), (*r["chosen"][PROMPT:], 1), (*r["rejected"][PROMPT:], 1))
        for r in split
    ]


def ours(kind: str, folder: Path, turns: Turns) -> None:
    """Train with `run_stages` until nobody asks any more."""
    told = json.loads((folder / "data.json").read_text())
    rows = told["rows"][kind]
    numbers: dict[str, Any] = {
        "name": kind, "objective": kind, "steps": 10_000, "batch_size": BATCH, "optimizer": "adamw",
        "adam_lr": 1e-3, "adam_beta2": 0.95, "weight_decay": 0.0, "warmup_share": 0.0, "decay_share": 0.0,
        "monitor_every": 0, "log_every": 10_000, "on_spike": "log",
    }  # fmt: skip
    config, more = StageConfig(**numbers), dict[str, Any]()
    body: Callable[[GPT], Any] = GPT.train  # the model as it is
    if kind == "sft":
        plan = DataPlan(
            phases=(Phase(from_step=0, weights={"rows": 1.0}),), digests={"rows": digest_of("rows")}
        )
        batches: Callable[[int, DataPlan], Any] = chat_batches(rows)
    elif kind in ("dpo", "reward"):
        shards = {"pairs": pairs_of(rows, kind)}
        plan, batches = preference_plan(shards), pair_batches(shards, BATCH, 0)
        if kind == "dpo":
            body, more["trainee"] = Policy, DPOTrainee(0.1)
        else:
            body, more["trainee"] = RewardModel, RewardTrainee()
    else:
        how = RLConfig(method="grpo", max_new_tokens=NEW, stop=(1,), group=GROUP, beta=0.05)
        prompts = {"prompts": [ids(r["prompt"]) for r in rows]}
        plan, batches = prompt_plan(prompts), prompt_batches(prompts, config, how)
        body = Policy
        more["trainee"] = PolicyTrainee(how, lambda p, a: [float(len(set(x))) for x in a])
    run = RunFolder(folder / f"run-{os.getpid()}").create()
    settings = Settings(threads=torch.get_num_threads())
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        now = environment(settings.threads, settings.dtype, settings.muon_dtype)
        enter_run(ledger, recipe_digest="bench", environment=now, body={"name": "bench"}, resume=False)
        run_stages(
            lambda: body(load_hf(folder)), [Stage(config, paced(batches, turns), plan)], run=run,
            ledger=ledger, settings=settings, objectives=OBJECTIVES, **more,
        )  # fmt: skip


# -- side by side --------------------------------------------------------------------------------------------


def race(kind: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kind: seconds a step of each, and the median of the rounds' ratios."""
    here = Path(__file__).parent
    threads = str(arguments.threads)
    commands = {
        "Glasshouse": [
            sys.executable, "-W", "ignore", __file__, "--work", kind, "--folder", str(folder),
            "--threads", threads,
        ],
        "TRL": [str(arguments.trl), "-W", "ignore", str(here / "peers_align.py"), kind, str(folder), threads],
    }  # fmt: skip
    took: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        steps = {
            who: stack.enter_context(Contestant(who, command, folder / f"{who}-{kind}.log"))
            for who, command in commands.items()
        }
        for _ in range(arguments.warm):
            for step in steps.values():
                step()
        with Quiet() as quiet:
            for _ in range(arguments.rounds):
                for who, step in steps.items():
                    took.setdefault(who, []).append(step())
    ratios = [b / a for a, b in zip(took["Glasshouse"], took["TRL"], strict=True)]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    speed = {who: statistics.median(seconds) for who, seconds in took.items()}
    about = {
        "shape": f"Llama {SHAPE}, V {VOCAB}, fp32, AdamW", "batch": BATCH, "prompt": PROMPT,
        "answer": NEW if kind == "grpo" else ANSWER, "rounds": arguments.rounds, "foreign": quiet.foreign,
        "threads": arguments.threads, "disturbed": quiet.disturbed, "goal": ">= 1", "met": ratio >= 1,
    }  # fmt: skip
    return [
        row(
            f"{TITLES[kind]}: times as fast a step", ratio, peer="TRL", peer_value=1.0, interval=[low, high],
            seconds=speed["Glasshouse"], peer_seconds=speed["TRL"], **about,
        )
    ]  # fmt: skip


def interval(ratios: list[float], n: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng, x = np.random.default_rng(0), np.array(ratios)
    medians = np.median(x[rng.integers(len(x), size=(n, len(x)))], axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    """Race the kinds asked for and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", type=Path, help="a python that has trl")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-disturbed", action="store_true", help="write a run that others slowed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.work:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        ours(arguments.work, arguments.folder, Turns(out))
        return
    if arguments.trl is None:
        raise SystemExit(
            "name a python that has trl: --trl FOLDER/venv-trl/bin/python (make parity makes one)"
        )
    rows = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="align-step-") as temporary:
        prepare(Path(temporary))
        for kind in arguments.kinds.split(","):
            rows += race(kind, Path(temporary), arguments)
            print(json.dumps(rows[-1]), flush=True)
    foreign = max(r["foreign"] or 0.0 for r in rows)
    if foreign > FOREIGN_LIMIT and not arguments.keep_disturbed:
        raise SystemExit(f"others took {foreign:.0%} of {machine()}: nothing was written")
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.kinds == ",".join(KINDS):
        write("align_step", rows)


if __name__ == "__main__":
    main()
