"""Tiny models on disk that the tests of `glasshouse lens` look into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.hf import save_hf
from glasshouse.tokenizer import Tokenizer
from story.tiny import text

CONTEXT = 48


def tokenizer() -> Tokenizer:
    """A tokenizer of invented words."""
    return Tokenizer.train(text(), 340)


def made(seed: int = 0, width: int = 24, layers: int = 2) -> GPT:
    """A model of noise, in which every part matters."""
    shape = {"context": CONTEXT, "d_model": width, "n_layer": layers, "n_head": 2, "d_mlp": 2 * width}
    model = GPT(GPTConfig(vocab_size=340, mlp="gated", activation="silu", **shape)).init_weights(seed)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.copy_(
                    torch.randn(p.shape, generator=noise) * (1.0 if "embed" in name else p.shape[1] ** -0.5)
                )
    return model.eval()


def stored(folder: Path, model: GPT) -> Path:
    """A Hugging Face folder with the tokenizer."""
    save_hf(model, folder)
    tokenizer().save(folder / "tokenizer.json")
    return folder


def broken(seed: int = 0) -> GPT:
    """A model of finite weights whose activations overflow into NaN."""
    model = made(seed)
    with torch.no_grad():
        model.blocks[0].norm1.weight.fill_(3e38)  # type: ignore[union-attr]
    return model


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def labelled(n: int = 48) -> list[dict[str, Any]]:
    """Texts that say "baro" (label 1) or "mite" (label 0) near their end, each in one of twelve meanings."""
    rng, rows = generator("lens rows"), list[dict[str, Any]]()
    for i in range(n):
        word, other = ("baro", "mite") if i % 2 else ("mite", "baro")
        lead = " ".join(rng.choice(["shalu", "foker", "nidas", "puvel"], size=3).tolist())
        rows.append(
            {
                "text": f"{lead} {word} {lead}",
                "label": i % 2 == 1,
                "group": f"{word} {i % 12}",
                "evidence": [word],
            }
        )
        assert other not in rows[-1]["text"]
    return rows
