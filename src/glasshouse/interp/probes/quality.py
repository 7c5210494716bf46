"""How good held-out scores are: AUROC with whole meanings as draws, and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from glasshouse.base.rng import generator
from glasshouse.base.score import Score, rate
from glasshouse.interp.probe import auroc
from glasshouse.interp.probes.rows import Bools, Floats

Z = NormalDist().inv_cdf(0.975)
Groups = NDArray[np.int64]


def area(scores: Floats, labels: Bools, group: Groups | None = None) -> Score:
    """AUROC of ``scores`` [n]; ``n`` of the result counts independent draws.

    Rows alone: DeLong et al. 1988 (``interp.probe.auroc``). Rows of one ``group`` [n] are not independent;
    then the variance is summed over groups (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve
    data"), of which DeLong's is the case of one row in each. Both vanish near 1: no interval is let be
    surer than Wilson's for perfect separation of as many groups as the smaller class has.
    """
    whole = auroc(scores, labels)
    ids = np.arange(len(scores)) if group is None else np.unique(group, return_inverse=True)[1]
    k, many, few = int(ids.max()) + 1, int(labels.sum()), int((~labels).sum())
    of_positive, of_negative = len(set(ids[labels].tolist())), len(set(ids[~labels].tolist()))
    low, high = whole.low, whole.high
    if k < len(ids):
        positive, negative = scores[labels], scores[~labels]
        wins = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
        over = np.bincount(ids[labels], wins.mean(1) - whole.value, minlength=k)  # a group's deviations
        under = np.bincount(ids[~labels], wins.mean(0) - whole.value, minlength=k)
        variance = _unbiased(of_positive) * float(over @ over) / many**2
        variance += _unbiased(of_negative) * float(under @ under) / few**2
        variance += 2 * _unbiased(k) * float(over @ under) / (many * few)
        half = Z * math.sqrt(max(0.0, variance))
        low, high = max(0.0, whole.value - half), min(1.0, whole.value + half)
    sure = rate(least := min(of_positive, of_negative), least).low
    return Score(whole.value, min(low, sure), max(high, 1 - sure), k)


def _unbiased(count: int) -> float:
    return count / (count - 1) if count > 1 else 1.0


def grouped_bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], group: Groups, *, seed: int = 0, draws: int = 500
) -> Score:
    """``statistic(row numbers)`` of all rows, its interval from drawing whole groups with replacement.

    Draws in which it cannot be computed (NaN: a class is missing) are left out.
    """
    rng, names = generator("grouped bootstrap", seed), np.unique(group)
    order = np.argsort(group, kind="stable")
    members = dict(
        zip(names.tolist(), np.split(order, np.flatnonzero(np.diff(group[order])) + 1), strict=True)
    )
    value, found = statistic(np.arange(len(group))), []
    for _ in range(draws):
        drawn = names[rng.integers(len(names), size=len(names))]
        one = statistic(np.concatenate([members[g] for g in drawn.tolist()]))
        if math.isfinite(one):
            found.append(one)
    low, high = np.quantile(found, [0.025, 0.975]) if found else (value, value)
    return Score(value, min(value, float(low)), max(value, float(high)), len(names))


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of about one predicted probability: its mean, and the share that was positive."""

    predicted: float
    observed: Score


@dataclass(frozen=True)
class Calibration:
    """Whether a probability of 0.8 is right eight times in ten.

    ``ece``: expected calibration error, the mean distance between predicted and observed over bins of equal
    counts (Naeini et al. 2015; equal-mass bins after Nixon et al. 2019). It is above 0 even for a perfectly
    calibrated probe; ``ece_if_calibrated`` is what such a probe would show on as many rows. ``brier``: mean
    squared error of the probability.
    """

    ece: Score
    ece_if_calibrated: float
    brier: float
    bins: tuple[ReliabilityBin, ...]


def expected_error(p: Floats, y: NDArray[np.float64], bins: int = 10) -> float:
    """ECE of probabilities ``p`` [n] for outcomes ``y`` [n] (0 or 1), bins of equal counts."""
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(abs(p[part].sum() - y[part].sum()) for part in parts) / len(p))


def calibration(
    scores: Floats, labels: Bools, group: Groups | None = None, *, bins: int = 10, seed: int = 0
) -> Calibration:
    """Calibration of log-odds ``scores`` [n] against ``labels`` [n]; the interval draws whole groups."""
    p = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    y, ids = labels.astype(np.float64), np.arange(len(p)) if group is None else group
    ece = grouped_bootstrap(lambda rows: expected_error(p[rows], y[rows], bins), ids, seed=seed, draws=300)
    rng = generator("calibrated", seed)
    perfect = [expected_error(p, (rng.random(len(p)) < p).astype(np.float64), bins) for _ in range(100)]
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    shown = tuple(ReliabilityBin(float(p[i].mean()), rate(int(y[i].sum()), len(i))) for i in parts)
    return Calibration(ece, float(np.mean(perfect)), float(np.mean((p - y) ** 2)), shown)
