"""Many e-values at once: from p-values, into one, and which of them to believe.

An e-value is a number that is at most 1 on average where its null is true. It may be read at any time and
may depend on others in any way, which p-values of tests on the same checkpoint do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glasshouse.base.evalue import e_bh

__all__ = ["at_level", "calibrate", "calibrate_mixture", "e_bh", "merge", "twins_needed"]


def calibrate(p: float, kappa: float = 0.5) -> float:
    """The e-value kappa p^(kappa - 1) of a p-value (Vovk & Wang 2021, "E-values: calibration, combination
    and applications", section 2). ValueError for a p outside (0, 1] or a kappa outside (0, 1)."""
    _check(p)
    if not 0 < kappa < 1:
        raise ValueError(f"kappa lies in (0, 1), not {kappa}")
    return kappa * p ** (kappa - 1)


def calibrate_mixture(p: float) -> float:
    """The mean of `calibrate` over all kappa, so that none need be chosen (Vovk & Wang 2021, section 2)."""
    _check(p)
    log = math.log(p)
    if log > -1e-4:  # the closed form is 0/0 at 1; its series there is 1/2 - log/6
        return 0.5 - log / 6
    return (1 - p + p * log) / (p * log * log)


def at_level(p: float, level: float) -> float:
    """All or nothing: 1/level if p <= level, else 0. The e-value that decides like the p-value at that level,
    and the only kind that reaches 1/level at p = level: every calibrator f has f(p) <= 1/p.
    """
    _check(p)
    _check(level)
    return 1 / level if p <= level * (1 + 1e-12) else 0.0  # ranks are fractions, as levels are


def merge(e_values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """One e-value against "all these nulls are true", however they depend: the (weighted) arithmetic mean,
    which no other symmetric rule beats (Vovk & Wang 2021, section 3). ValueError for none or a negative one.
    """
    e = np.asarray(e_values, dtype=np.float64)
    w = np.full(len(e), 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(e) == 0 or w.shape != e.shape or not (e >= 0).all() or not (w >= 0).all() or w.sum() <= 0:
        raise ValueError("merging needs e-values and weights, as many of each, none negative or NaN")
    return float((e * w).sum() / w.sum())


def twins_needed(level: float) -> int:
    """How many clean twins must be ranked so that a conformal p-value, never below 1/(n + 1), can reach
    ``level``."""
    _check(level)
    return math.ceil(1 / level - 1e-9) - 1


def _check(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"a p-value or level lies in (0, 1], not {p}")
