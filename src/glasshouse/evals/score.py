"""A number with its uncertainty: there is no way to report a bare rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Score:
    """An estimate, its two-sided 95% interval, and the number of independent samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def rate(successes: int, n: int, level: float = 0.95) -> Score:
    """A proportion with its score interval (Wilson 1927), honest at 0 and 1. ValueError when n is 0."""
    if n <= 0:
        raise ValueError("a rate of nothing: n is 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Score(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)
