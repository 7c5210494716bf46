"""Directions in the residual stream: found from differences of means, tested by ablation and steering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.model.taps import Edit


def difference_of_means(positive: Tensor, negative: Tensor) -> Tensor:
    """Unit vector [d_model] from the mean of ``negative`` [n, d_model] to that of ``positive`` [m, d_model].

    After Arditi et al. (2024), "Refusal in language models is mediated by a single direction".
    VerificationError when a side is empty or the means coincide.
    """
    if len(positive) == 0 or len(negative) == 0:
        raise VerificationError("a direction needs examples of both classes")
    difference = positive.float().mean(0) - negative.float().mean(0)
    norm = difference.norm()
    if not torch.isfinite(norm) or norm < 1e-8:
        raise VerificationError(
            "the two classes have the same mean activation; there is no direction between them"
        )
    return difference / norm


def project_out(direction: Tensor, centre: Tensor | None = None) -> Edit:
    """An edit that removes the component along unit ``direction``, or sets it to that of ``centre``."""
    level = torch.zeros(()) if centre is None else centre.float() @ direction

    def edit(x: Tensor) -> Tensor:
        amount = (x.float() @ direction - level).unsqueeze(-1)
        return (x.float() - amount * direction).to(x.dtype)

    return edit


def steer(direction: Tensor, amount: float) -> Edit:
    """An edit that adds ``amount`` times unit ``direction`` at every position."""

    def edit(x: Tensor) -> Tensor:
        return x + (amount * direction).to(x.dtype)

    return edit


def random_directions(n: int, d_model: int, rng: np.random.Generator) -> Sequence[Tensor]:
    """``n`` unit vectors drawn evenly from the sphere, the control of every ablation."""
    drawn = torch.from_numpy(rng.standard_normal((n, d_model)).astype(np.float32))
    return list(drawn / drawn.norm(dim=1, keepdim=True))
