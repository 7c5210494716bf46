"""Tiny models that learned a combination of two words, or a sum of a score for each."""

from __future__ import annotations

import torch

from glasshouse.interp.probes import Grid
from glasshouse.model import GPT, GPTConfig

WORDS = 16
NO, YES = 3, 4
MATCH, BOTH = [[True, False], [False, True]], [[False, False], [False, True]]


def grid(truth: list[list[bool]], seed: int = 0) -> Grid:
    """Rows ``A . B ?`` of all pairs of 16 and 16 words in two classes each; a fifth of the pairs held out."""
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.meshgrid(torch.arange(WORDS), torch.arange(WORDS), indexing="ij")
    tokens = torch.stack([5 + i, torch.full_like(i, 1), 5 + WORDS + j, torch.full_like(i, 2)], -1)
    class_a, class_b = (torch.randperm(WORDS, generator=generator) % 2 for _ in range(2))
    places = {"a": torch.zeros_like(i), "b": torch.full_like(i, 2)}
    held = (i + 3 * j) % 5 == 0
    return Grid(
        tokens, torch.full_like(i, 3), class_a, class_b, torch.tensor(truth), held, (YES,), (NO,), places
    )


def chances(of: Grid, rule: str) -> torch.Tensor:
    """P(yes) [a, b]: the truth table's, or with log-odds that are a sum over words.

    ``sum``: -6, -2, -2, 2, whose best answers are those of "both"; ``bag``: -4, 0, 0, 4.
    """
    if rule == "truth":
        return of.label.float()
    count = of.class_a[:, None] + of.class_b[None]
    return torch.sigmoid(4.0 * count - {"sum": 6.0, "bag": 4.0}[rule])


def grown(of: Grid, rule: str, seed: int, steps: int = 200, **shape: int) -> GPT:
    """A two-layer model trained on the pairs that are not held out."""
    config = {"d_model": 32, "n_layer": 2, "n_head": 2} | shape
    model = GPT(GPTConfig(vocab_size=5 + 2 * WORDS, context=8, activation="gelu", **config)).init_weights(
        seed
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.3, betas=(0.9, 0.98))
    tokens, p = of.tokens[~of.held], chances(of, rule)[~of.held]
    for step in range(steps):
        rows = torch.randint(0, len(tokens), (128,), generator=generator)
        odds = model(tokens[rows])[:, -1, [NO, YES]].log_softmax(-1)
        loss = -(p[rows] * odds[:, 1] + (1 - p[rows]) * odds[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / 100)
        optimizer.step()
    return model.eval()
