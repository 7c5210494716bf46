"""The linear probes: ridge regression, difference of means, and logistic regression.

Each returns a weight [d] and a bias in the units of the activations as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glasshouse.interp.probe import auroc, fit_logistic
from glasshouse.interp.probes.rows import Bools, Floats

Scoring = Literal["log_loss", "accuracy", "auroc"]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
Line = tuple[Floats, float]


def scale_of(x: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation [d] of ``x`` [n, d]; 1 where a column is constant up to rounding."""
    mean, variance, n = x.mean(0), x.var(0), len(x)
    eps = np.finfo(np.float64).eps
    # Below this a deviation is only rounding; the bound is that of scikit-learn's StandardScaler.
    still = variance <= n * eps * variance + (n * mean * eps) ** 2
    return mean, np.where(still, 1.0, np.sqrt(variance))


def mean_difference(x: Floats, y: Bools) -> Line:
    """Mean of the positive rows less that of the negative; zero halfway between (Marks & Tegmark 2023)."""
    positive, negative = x[y].mean(0), x[~y].mean(0)
    weight = positive - negative
    return weight, float(-weight @ (positive + negative) / 2)


def ridge(x: Floats, y: Bools, alpha: float) -> Line:
    """Least squares on targets +1 and -1, with ``alpha |w|^2``; the bias is free. ``alpha`` 0 is ordinary."""
    centre, target = x.mean(0), np.where(y, 1.0, -1.0)
    u, s, vt = np.linalg.svd(x - centre, full_matrices=False)
    kept = s > s[0] * max(x.shape) * np.finfo(np.float64).eps if len(s) and s[0] > 0 else s > 0
    shrunk = np.where(kept, s / np.where(kept, s * s + alpha, 1.0), 0.0)
    weight = vt.T @ (shrunk * (u.T @ (target - target.mean())))
    return weight, float(target.mean() - centre @ weight)


def logistic(x: Floats, y: Bools, c: float) -> Line:
    """``fit_logistic``, in the span of the rows when there are fewer of them than columns.

    The penalty does not change under rotation and the optimum lies in that span, so it is the same optimum.
    """
    if len(x) >= x.shape[1]:
        found = fit_logistic(x, y, c)
        return found.weight, found.bias
    basis = np.linalg.qr(x.T)[0]  # [d, n]
    found = fit_logistic(x @ basis, y, c)
    return basis @ found.weight, found.bias


def chosen(
    x: Floats,
    y: Bools,
    fit: Callable[[Floats, Bools, float], Line],
    strengths: Sequence[float],
    parts: Sequence[Fold],
    loss: Callable[[Floats, Bools], float],
) -> float:
    """The first of ``strengths`` with the least ``loss`` of held-out scores, averaged over the folds.

    Rows are put into their own span once: all fits are rotation-invariant, and wide activations shrink.
    """
    if len(x) < x.shape[1]:
        x = x @ np.linalg.qr(x.T)[0]
    best, least = strengths[0], np.inf
    for strength in strengths:
        total = 0.0
        for train, test in parts:
            weight, bias = fit(x[train], y[train], strength)
            total += loss(x[test] @ weight + bias, y[test])
        if total < least - 1e-12:
            best, least = strength, total
    return best


def log_loss(z: Floats, y: Bools) -> float:
    """Mean negative log-likelihood in nats of log-odds ``z`` [n]."""
    return float(np.mean(np.logaddexp(0, z) - y * z))


def squared_error(z: Floats, y: Bools) -> float:
    """Mean squared distance of ``z`` [n] to +1 or -1."""
    return float(np.mean((z - np.where(y, 1.0, -1.0)) ** 2))


LOSS: dict[Scoring, Callable[[Floats, Bools], float]] = {
    "log_loss": log_loss,
    "accuracy": lambda z, y: -float(np.mean((z > 0) == y)),
    "auroc": lambda z, y: -auroc(z, y).value,
}


def platt(z: Floats, y: Bools) -> tuple[float, float]:
    """Slope (above 0) and shift that turn held-out scores ``z`` [n] into log-odds (Platt 1999).

    A score that ranks held-out rows the wrong way round gets a slope near zero, never a negative one: the
    direction a probe found is not turned over afterwards.
    """
    spread = float(z.std()) or 1.0
    found = fit_logistic(z[:, None] / spread, y, 10.0)
    slope = max(float(found.weight[0]) / spread, 1e-3 / spread)
    return slope, found.bias
