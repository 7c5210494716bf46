"""Before the first step: the scale of the activations, and a decoder bias in their middle."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from glasshouse.base.errors import DataError
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary, refuse_not_finite


@torch.no_grad()
def fit_start(
    model: Dictionary, batch: ActivationBatch, bias: Literal["median", "mean", "zero"] = "median"
) -> Dictionary:
    """Set the scales (where the config normalises) and ``b_dec`` from a sample; return ``model``.

    The scale makes the mean norm sqrt(width) (Conerly et al., "Circuits updates, April 2024"); ``b_dec`` is
    the geometric median (Bricken et al. 2023) or the mean of what is to be reconstructed. Raises DataError
    for activations that are not finite, all zero, or of another width.
    """
    y = batch.x if batch.y is None else batch.y
    for values, width in ((batch.x, model.config.d_in), (y, model.config.out)):
        refuse_not_finite(values, batch.shards)
        if values.shape[-1] != width:
            raise DataError(f"activations of width {values.shape[-1]} for a dictionary of width {width}")
    if model.config.normalize_activations != "none":
        model.scale_in.fill_(scale_to_root_width(batch.x))
        model.scale_out.fill_(scale_to_root_width(y))
    if bias != "zero":
        scaled = y.to(model.b_dec.dtype) * model.scale_out
        model.b_dec.copy_(geometric_median(scaled) if bias == "median" else scaled.mean(0))
    return model


def scale_to_root_width(x: Tensor) -> float:
    """The factor that makes the mean norm of ``x`` [n, width] sqrt(width)."""
    norm = float(x.float().norm(dim=1).mean())
    if norm <= 0:
        raise DataError("all activations are zero: there is no scale; read another site")
    return math.sqrt(x.shape[1]) / norm


def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [width] with the least mean distance to ``x`` [n, width], by Weiszfeld's iteration (1937)."""
    middle = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - middle).norm(dim=1).clamp(min=1e-8)
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        change = (moved - middle).norm()
        middle = moved
        if change <= tolerance * (1 + middle.norm()):
            break
    return middle
