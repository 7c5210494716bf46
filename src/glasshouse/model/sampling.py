"""From logits to a token: temperature, filters, and one uniform number a token.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 takes the likeliest (the lowest id on ties).

    The filters apply after the temperature, in the order top_k, top_p, min_p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must lie in [0, 1], not {self.min_p}")
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = [name for name, value in filters.items() if value is not None]
        if self.temperature == 0 and given:
            raise UsageError(
                f"{' and '.join(given)} has no effect at temperature 0; leave it out, or set a temperature"
            )

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """float64 [B, V] after temperature and filters; rows need not sum to one. Temperature above 0."""
        x = logits_BV.double()
        # The likeliest logit becomes 0 first: at a tiny temperature the quotient would overflow, inf - inf.
        x = (x - x.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < x.shape[-1]:
            kth = x.topk(self.top_k, dim=-1).values[:, -1:]
            x = x.masked_fill(x < kth, float("-inf"))
        p = x.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            # Nucleus (Holtzman et al. 2020): the smallest set whose mass reaches top_p.
            before = ordered.cumsum(dim=-1) - ordered
            p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        if self.min_p is not None:
            # Nguyen et al. 2024 (arXiv 2407.01082): at least this share of the likeliest token's probability.
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        return p

    def choose(self, logits_BV: Tensor, uniforms_B: np.ndarray | None) -> Tensor:
        """Token ids int64 [B]; ``uniforms_B`` float64 in [0, 1), one per row (None when greedy).

        A row's token is where the cumulative probability passes its uniform, so it depends on the row's
        own logits and number alone: equal logits give equal tokens.
        """
        if uniforms_B is None:
            return logits_BV.argmax(dim=-1)
        below = self.probabilities(logits_BV).cumsum(dim=-1)
        target = torch.from_numpy(uniforms_B).to(below.device)[:, None] * below[:, -1:]
        at = torch.searchsorted(below, target, right=True)
        # Rounding may put the target on the very end, beyond the last token that has any probability.
        last = torch.searchsorted(below, below[:, -1:].contiguous(), right=False)
        return at.minimum(last).squeeze(-1)


def likeliest(logp_BV: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """The ``n`` likeliest tokens of each row as (id, log-probability), best first."""
    values, ids = logp_BV.topk(min(n, logp_BV.shape[-1]), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
