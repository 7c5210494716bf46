"""The learning rate as a pure function of the step: warm-up, stable, decay."""

from __future__ import annotations

import math
from typing import Literal


def warmup_stable_decay(
    step: int,
    steps: int,
    *,
    warmup_share: float,
    decay_share: float,
    final_share: float = 0.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Return the factor in (0, 1] by which update ``step`` (0-based, of ``steps``) scales every learning
    rate.

    Linear up over the first ``warmup_share`` of the steps, one in the middle, down to ``final_share`` over
    the last ``decay_share`` (WSD: Hu et al. 2024, MiniCPM): along a line (Defazio et al. 2023) or half a
    cosine; a cosine over all that follows the warm-up is the schedule of Loshchilov & Hutter (2017).
    The last update still has a positive rate: ``final_share`` is reached one step after the end.
    Raises ValueError for a step outside [0, steps).
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside [0, {steps})")
    warmup, decay = math.ceil(warmup_share * steps), math.ceil(decay_share * steps)
    up = (step + 1) / warmup if step < warmup else 1.0
    left = min(1.0, (steps - step) / decay) if decay else 1.0
    if shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return min(up, final_share + (1.0 - final_share) * left)
