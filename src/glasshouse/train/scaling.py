"""One dial: the depth sets shape, horizon, batch, learning rates and weight decay.

| what         | rule                                                  | from                               |
|--------------|-------------------------------------------------------|------------------------------------|
| width, heads | 32 depth; heads of 32                                 | chosen: narrow, for small machines |
| horizon      | D = TOKENS_PER_PARAMETER x N tokens                   | sweep at equal compute             |
| batch        | b = BATCH x (D / 1e6) ** BATCH_EXPONENT tokens        | sweeps                             |
| muon_lr      | MUON_LR x sqrt(b / 1024)                              | sweeps: no trend with the width    |
| adam_lr      | ADAM_LR x sqrt(b / 1024) x sqrt(128 / width)          | sweeps; the exponent is chosen     |
| weight decay | DECAY / (muon_lr x steps)                             | sweeps (Wang & Aitchison 2024)     |

N counts the parameters of matrix products (the head, not the embedding). That rates follow the batch by its
square root is from Malladi et al. 2022. The numbers below were fitted by `benchmarks/fit_scaling.py`;
`docs/scaling.md` shows the sweeps, the intervals and where the rules have not been tried. Each of them yields
to an explicit value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glasshouse.model import GPTConfig

ASPECT = 32
HEAD_WIDTH = 32
TOKENS_PER_PARAMETER = 5.0
BATCH, BATCH_EXPONENT = 1080.0, 0.3
MUON_LR, ADAM_LR = 0.013, 0.027  # for a batch of UNIT tokens, and a width of 128
UNIT, WIDTH = 1024, 128
DECAY = 0.56


@dataclass(frozen=True)
class Horizon:
    """How long and in what steps a stage trains, and at which rates."""

    steps: int
    batch_size: int
    muon_lr: float
    adam_lr: float
    weight_decay: float


def shape(depth: int) -> dict[str, int]:
    """Layers, width and heads of a depth. ValueError below 1."""
    if depth < 1:
        raise ValueError(f"a depth of {depth} is no model: use 1 or more")
    return {"n_layer": depth, "d_model": ASPECT * depth, "n_head": ASPECT * depth // HEAD_WIDTH}


def matrix_parameters(config: GPTConfig) -> int:
    """N: weights of matrix products, the (tied) head included; no embedding, norm or bias."""
    D, K = config.d_model, config.head_width
    attention = 2 * D * K * (config.n_head + config.kv_heads)
    mlp = (3 if config.mlp == "gated" else 2) * D * config.mlp_width
    return config.n_layer * (attention + mlp) + D * config.vocab_size


def horizon(
    config: GPTConfig, explicit: Mapping[str, Any], tokens_per_parameter: float | None = None
) -> Horizon:
    """The numbers of a pre-training stage of this model; those in ``explicit`` are kept and built upon.

    ``explicit`` may hold any field of `Horizon`. Steps and batch given together are the horizon; rates follow
    the batch and weight decay the steps and rates, given or not. ValueError for a ratio, a batch or steps
    that are not positive.
    """
    ratio = TOKENS_PER_PARAMETER if tokens_per_parameter is None else tokens_per_parameter
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"tokens_per_parameter is {ratio}: use a positive number")
    rows, steps = explicit.get("batch_size"), explicit.get("steps")
    for name, value in (("batch_size", rows), ("steps", steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}: use a whole number from 1")
    tokens = ratio * matrix_parameters(config)
    if rows is not None and steps is not None:
        tokens = float(rows * steps * config.context)
    rows = rows if rows is not None else max(1, round(best_batch(tokens) / config.context))
    steps = steps if steps is not None else max(1, math.ceil(tokens / (rows * config.context)))
    share = math.sqrt(rows * config.context / UNIT)
    muon_lr = explicit.get("muon_lr", rounded(MUON_LR * share))
    adam_lr = explicit.get("adam_lr", rounded(ADAM_LR * share * math.sqrt(WIDTH / config.d_model)))
    decay = explicit.get("weight_decay", rounded(DECAY / max(muon_lr * steps, 1.0)))
    return Horizon(steps, rows, muon_lr, adam_lr, decay)


def best_batch(tokens: float) -> float:
    """Tokens in a batch that suit a horizon of ``tokens``."""
    return BATCH * (tokens / 1e6) ** BATCH_EXPONENT


def rounded(value: float) -> float:
    """Three significant digits: what a recipe shows is what is used."""
    return float(f"{value:.3g}")
