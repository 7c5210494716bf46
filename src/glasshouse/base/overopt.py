"""The over-optimisation curve: how a gold score follows the distance a policy has gone for its proxy.

With d = sqrt(KL(policy || start)) in nats, Gao, Schulman & Hilton (2022, "Scaling laws for reward model
overoptimization", arXiv 2210.10760, sec. 3.1) find that the gain in gold score is

    RL         R(d) = d (alpha - beta log d)        peak at d* = exp(alpha / beta - 1), gain beta d*
    best-of-n  R(d) = d (alpha - beta d)            peak at d* = alpha / (2 beta),      gain alpha d* / 2

Both are linear in (alpha, beta), so that a fit is weighted least squares, with an offset for the score of the
start. The interval of a peak is Fieller's (1954): all d at which a slope of 0 is not rejected; it has no end
while the fall of the slope (beta) is not yet beyond doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glasshouse.base.errors import DataError

Form = Literal["rl", "best_of_n"]
Floats = NDArray[np.float64]
FEWEST = 4  # measurements of three coefficients
LARGEST = 700.0  # exp of more is no float


def basis(d: ArrayLike, form: Form = "rl") -> Floats:
    """What offset, alpha and beta multiply at distances ``d`` [n]: [n, 3]."""
    x = np.atleast_1d(np.asarray(d, dtype=np.float64))
    bend = x * np.log(np.where(x > 0, x, 1.0)) if form == "rl" else x * x
    return np.stack([np.ones_like(x), x, -bend], axis=1)


def slope(d: float, form: Form = "rl") -> Floats:
    """What they multiply in dR/dd at one distance: [3]. ``d`` = 0 is taken as 1e-9."""
    x = max(d, 1e-9)
    return np.array([0.0, 1.0, -(1.0 + math.log(x)) if form == "rl" else -2.0 * x])


@dataclass(frozen=True)
class Peak:
    """Where a fitted curve turns: distance ``d`` with its interval (``high`` may be infinite), the score
    there and the gain over the start.
    """

    d: float
    low: float
    high: float
    score: float
    gain: float


@dataclass(frozen=True, eq=False)
class Curve:
    """A fitted curve: ``coefficients`` [offset, alpha, beta], their ``covariance`` [3, 3], from ``n``
    measurements up to distance ``reach``. ``misfit`` is chi-square per degree of freedom; above 1 the
    covariance is larger by as much.
    """

    form: Form
    coefficients: Floats
    covariance: Floats
    n: int
    reach: float
    misfit: float

    def at(self, d: float) -> tuple[float, float]:
        """Score at a distance, and its standard error. Beyond ``reach`` it is an extrapolation."""
        x = basis(d, self.form)[0]
        with np.errstate(over="ignore"):  # a peak may lie anywhere
            return float(x @ self.coefficients), math.sqrt(max(float(x @ self.covariance @ x), 0.0))

    def slope_at(self, d: float) -> tuple[float, float]:
        """dR/dd at a distance, and its standard error."""
        x = slope(d, self.form)
        return float(x @ self.coefficients), math.sqrt(max(float(x @ self.covariance @ x), 0.0))

    @cached_property
    def peak(self) -> Peak | None:
        """Where it turns, with a 95% interval. None for a curve that only rises or only falls."""
        offset, alpha, beta = (float(c) for c in self.coefficients)
        at = self._distance(alpha / beta) if beta > 0 else math.inf
        if beta <= 0 or (self.form == "best_of_n" and alpha <= 0) or not math.isfinite(at):
            return None
        low, high = self._fieller(0.95)
        score = self.at(at)[0]
        return Peak(at, min(low, at), max(high, at), score, score - offset)

    def _distance(self, u: float) -> float:
        """The distance at which the slope is 0, for u = alpha / beta."""
        if self.form == "best_of_n":
            return max(u, 0.0) / 2
        return math.exp(u - 1) if u < LARGEST else math.inf

    def _fieller(self, level: float) -> tuple[float, float]:
        """All u with (alpha - beta u)^2 <= z^2 Var(alpha - beta u), as distances."""
        z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
        alpha, beta = float(self.coefficients[1]), float(self.coefficients[2])
        aa, ab, bb = (float(self.covariance[i, j]) for i, j in ((1, 1), (1, 2), (2, 2)))
        a, b, c = beta**2 - z2 * bb, alpha * beta - z2 * ab, alpha**2 - z2 * aa  # a u^2 - 2 b u + c <= 0
        inside = b * b - a * c
        if inside < 0 or a == 0:
            return 0.0, math.inf
        ends = sorted(((b - math.sqrt(inside)) / a, (b + math.sqrt(inside)) / a))
        if a > 0:
            return self._distance(ends[0]), self._distance(ends[1])
        return (self._distance(ends[1]) if ends[1] > alpha / max(beta, 1e-300) - LARGEST else 0.0), math.inf


def fit(d: ArrayLike, score: ArrayLike, se: ArrayLike | float, form: Form = "rl") -> Curve:
    """Weighted least squares of scores [n] with standard errors [n] at distances [n].

    DataError for fewer than four measurements, one that is not finite, a standard error of 0, or distances
    that do not tell three coefficients apart.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (d, score))
    s = np.broadcast_to(np.asarray(se, dtype=np.float64), y.shape)
    if len(y) < FEWEST or x.shape != y.shape:
        raise DataError(f"a curve of three coefficients needs at least {FEWEST} measurements, not {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(s).all()) or (s <= 0).any():
        raise DataError("a curve is fitted to finite scores with standard errors above 0")
    if (x < 0).any():
        raise DataError("a distance is the square root of a KL divergence, and not negative")
    design, target = basis(x, form) / s[:, None], y / s
    if np.linalg.matrix_rank(design) < 3:
        raise DataError("all measurements are at the same distance or two; no curve goes through them alone")
    found: Floats = np.linalg.lstsq(design, target, rcond=None)[0].astype(np.float64)
    misfit = float(np.square(target - design @ found).sum()) / max(len(y) - 3, 1)
    covariance: Floats = np.linalg.inv(design.T @ design).astype(np.float64) * max(misfit, 1.0)
    return Curve(form, found, covariance, len(y), float(x.max()), misfit)


def scatter(score: ArrayLike) -> float:
    """Standard error of single scores [n] of a smooth series, from the median step between neighbours.

    Rice (1984) takes the mean of squared steps; the median does not see a jump. Never 0.
    """
    y = np.asarray(score, dtype=np.float64)
    size = float(np.abs(y).max(initial=0.0)) or 1.0
    if len(y) < 2:
        return size
    return max(float(np.median(np.abs(np.diff(y)))) / (0.6744897501960817 * math.sqrt(2)), 1e-9 * size)
