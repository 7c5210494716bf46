"""Linear probes, and the numbers that say whether a probe means something."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from glasshouse.base.errors import VerificationError


@dataclass(frozen=True)
class Auroc:
    """Area under the ROC curve with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def auroc(scores: np.ndarray, labels: np.ndarray) -> Auroc:
    """AUROC of ``scores`` [n] for boolean ``labels`` [n], interval after DeLong et al. (1988).

    Scores that separate the classes perfectly, or are all equal, show no variance; then the interval is
    Wilson's, for as many trials as the smaller class has members: a handful never gives certainty.
    VerificationError when a class is empty or a score is not finite: nothing could be concluded.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if not np.isfinite(scores).all():
        raise VerificationError("probe scores are not finite; the activations hold NaN or infinity")
    positive, negative = scores[labels], scores[~labels]
    if len(positive) == 0 or len(negative) == 0:
        raise VerificationError(
            f"AUROC needs both classes; got {len(positive)} positive and {len(negative)} negative"
        )
    wins = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    value = float(wins.mean())
    variance = _sample_variance(wins.mean(1)) / len(positive) + _sample_variance(wins.mean(0)) / len(negative)
    half = 1.96 * math.sqrt(variance)
    low, high = max(0.0, value - half), min(1.0, value + half)
    if variance == 0:
        few, z2 = min(len(positive), len(negative)), 1.96**2
        centre = (value + z2 / (2 * few)) / (1 + z2 / few)
        half = math.sqrt(z2 * (value * (1 - value) / few + z2 / (4 * few * few))) / (1 + z2 / few)
        low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
    return Auroc(value, low, high, len(scores))


def _sample_variance(x: np.ndarray) -> float:
    return float(x.var(ddof=1)) if len(x) > 1 else 0.25


@dataclass(frozen=True)
class LinearProbe:
    """Scores are ``x @ weight + bias``, the log-odds of the positive class; weight [d_model]."""

    weight: np.ndarray
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scores [n] of activations [n, d_model]."""
        return np.asarray(x, dtype=np.float64) @ self.weight + self.bias


def fit_logistic(x: np.ndarray, y: np.ndarray, c: float = 1.0, iterations: int = 50) -> LinearProbe:
    """L2-regularised logistic regression by Newton's method, the optimum scikit-learn finds with ``C=c``.

    ``x`` [n, d_model], ``y`` bool [n]. Minimises ``|w|^2 / 2 + c * sum log-loss``; the bias is free.
    VerificationError for one class only or non-finite activations.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=bool)
    if not np.isfinite(x).all():
        raise VerificationError("activations hold NaN or infinity; no probe can be fitted")
    if y.all() or not y.any():
        raise VerificationError("a probe needs examples of both classes")
    design = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.diag([1.0] * x.shape[1] + [0.0])
    w = np.zeros(design.shape[1])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -500, 500)))
        gradient = penalty @ w + c * design.T @ (p - y)
        hessian = penalty + c * (design * (p * (1 - p) + 1e-12)[:, None]).T @ design
        step = np.linalg.solve(hessian, gradient)
        w, before = _line_search(design, y, c, w, step), w
        if np.abs(w - before).max() < 1e-8:
            break
    return LinearProbe(w[:-1], float(w[-1]))


def _line_search(design: np.ndarray, y: np.ndarray, c: float, w: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Halve the Newton step until the loss falls: on separable data full steps overshoot."""

    def loss(at: np.ndarray) -> float:
        z = design @ at
        return float(at[:-1] @ at[:-1] / 2 + c * np.sum(np.logaddexp(0, z) - y * z))

    start, size = loss(w), 1.0
    while size > 1e-6 and loss(w - size * step) > start:
        size /= 2
    return w - size * step


def control_labels(keys: list[str], rng: np.random.Generator) -> np.ndarray:
    """Random labels, one for each distinct key: a control task (Hewitt & Liang 2019).

    A probe that can learn these has capacity to memorise; its selectivity is its score minus theirs.
    """
    distinct = sorted(set(keys))
    flip = dict(zip(distinct, (rng.permutation(len(distinct)) % 2).astype(bool).tolist(), strict=True))
    return np.array([flip[k] for k in keys])
