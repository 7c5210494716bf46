"""A number with its uncertainty: there is no way to report a bare rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] | None = None,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Score:
    """``statistic`` (default the mean) of independent ``values`` [n], with its percentile bootstrap interval.

    Efron 1979. The interval of fewer than three values is theirs, from the least to the greatest: a bootstrap
    of two would claim more. ValueError when there is none or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"a score needs finite values; got {len(x)}, {int((~np.isfinite(x)).sum())} not finite"
        )
    of = statistic or (lambda v: float(v.mean()))
    value = float(of(x))
    if len(x) < 3:
        return Score(value, float(x.min()), float(x.max()), len(x))
    rng = np.random.default_rng(seed)
    drawn = [of(x[rng.integers(len(x), size=len(x))]) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Score(value, min(value, float(low)), max(value, float(high)), len(x))
