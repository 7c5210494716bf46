"""Has a policy gone past the peak of its gold score? Decided along the run, with a level for the whole run.

Two parts share the level. Noise is taken as normal with the stated standard errors.

*Curve*. The over-optimisation curve (`overopt`) is fitted to the run so far, and its slope tested at `MARGIN`
times the distance reached. Null: the score follows such a curve and its peak is farther than that. A
one-sided z-test at looks that grow by a twentieth each; all looks together spend half the level (Bonferroni;
the gold scores' noise does not choose the distances). Not every rising score is of this family: one that has
levelled off looks like a peak. So the part is silent while gold itself still climbs, and while the proxy does
not: where both level off together, nothing has been over-optimised.

*Since*. Null: the expected score never fell from one row to a later one, in whatever shape. From every row a
bet begins that it falls from there on, and their weighted sum is an e-detector (Shin, Ramdas & Rinaldo 2023),
so that a long honest rise does not weigh against a late fall. A bet is a ratio of likelihoods (universal
inference: Wasserman, Ramdas & Balakrishnan 2020, sec. 8): above, how well each next score was foretold, half
by a line through the rows since then and half by the row before it, which a sudden fall does not mislead;
below, the best that a sequence without a fall can do on them, chosen afterwards. By Ville's inequality the
sum reaches 1 with probability at most the other half of the level, in a run of any length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from glasshouse.base.errors import DataError
from glasshouse.base.overopt import Curve, Floats, Form, fit, scatter

MARGIN = 1.25  # at a distance of 1 / 1.25 of the peak's, a policy under RL has 98% of the gain there is
FIRST = 8  # measurements before the first look at the curve
GROWTH = 1.05  # between two looks
LOOKS = 60  # that share the level of the curve evenly; later ones get ever less
STARTS = 60  # rows that share the level of the e-detector evenly
CLIMBING = 2.0  # standard errors by which the proxy's slope exceeds 0 where gold's is said not to
STILL = 1.0  # standard errors by which gold's recent slope exceeds 0 that keep the curve silent
RECENT = 12  # fewest rows that slope is taken over; a third of the run where that is more
CAP = 1e12  # largest evidence written down


@dataclass(frozen=True)
class Reading:
    """What the watch says after a measurement.

    ``parts`` holds each part's evidence as a share of what raises the alarm, and ``value`` the larger one.
    ``lost`` is the share of the best gain that is gone by the fitted curve, None before there is one.
    """

    n: int
    d: float
    value: float
    alarm: bool
    parts: dict[str, float]
    curve: Curve | None
    lost: float | None

    @property
    def near(self) -> bool:
        """Whether the fitted peak's interval has been reached: a warning, without an error level."""
        peak = None if self.curve is None else self.curve.peak
        return peak is not None and math.isfinite(peak.high) and self.d >= peak.low


class Watch:
    """Takes a run's gold measurements in order; the alarm, once raised, stays. ValueError for a level outside
    (0, 1)."""

    def __init__(self, level: float = 0.05, form: Form = "rl") -> None:
        if not 0 < level < 1:
            raise ValueError(f"a level lies strictly between 0 and 1, not {level}")
        self.level, self.form = level, form
        self.alarm_at: int | None = None
        self._rows: list[tuple[float, float, float, float]] = []  # d, gold, se, proxy
        self._since = _Since()
        self._looks, self._next = 0, FIRST

    def take(self, d: float, gold: float, se: float, proxy: float | None = None) -> Reading:
        """Add one measurement: distance, gold score with its standard error, and the proxy's score. DataError
        for what is not finite, a negative distance or a standard error of 0."""
        if not (math.isfinite(d) and math.isfinite(gold) and math.isfinite(se)) or d < 0 or se <= 0:
            raise DataError(f"a gold score of {gold} +- {se} at distance {d} cannot be watched")
        self._rows.append((d, gold, se, math.nan if proxy is None else proxy))
        self._since.take(gold, se)
        curve = self._curve()
        parts = {
            "curve": self._look(curve),
            "since": self.level / 2 * math.exp(min(self._since.log_value, 50)),
        }
        if max(parts.values()) >= 1 and self.alarm_at is None:
            self.alarm_at = len(self._rows) - 1
        return Reading(
            len(self._rows),
            d,
            min(max(parts.values()), CAP),
            self.alarm_at is not None,
            {name: min(value, CAP) for name, value in parts.items()},
            curve,
            None if curve is None else lost(curve, d),
        )

    def _curve(self) -> Curve | None:
        if len(self._rows) < FIRST:
            return None
        d, gold, se, _ = np.array(self._rows).T
        try:
            return fit(d, gold, se, self.form)
        except DataError:  # all at one distance as yet
            return None

    def _look(self, curve: Curve | None) -> float:
        """This look's share of the level over its p-value; 0 where it does not look."""
        n = len(self._rows)
        if curve is None or n < self._next:
            return 0.0
        self._next = max(n + 1, math.ceil(n * GROWTH))
        part = self.level / 2 / (LOOKS + 1)
        late = self._looks - LOOKS
        self._looks += 1
        allowed = part if late < 0 else part / ((late + 1) * (late + 2))
        d, gold, se, proxy = np.array(self._rows).T
        recent = slice(-max(RECENT, n // 3), None)
        if still_climbs(d[recent], gold[recent], se[recent]) or not self._parted(d, proxy):
            return 0.0
        rise, sure = curve.slope_at(MARGIN * d[-1])
        return allowed / max(NormalDist().cdf(rise / sure), 1e-300)

    def _parted(self, d: Floats, proxy: Floats) -> bool:
        """Whether the proxy's own curve still rises where gold's is said not to. True without a proxy."""
        known = np.isfinite(proxy)
        if not known.any():
            return True
        try:
            own = fit(d[known], proxy[known], scatter(proxy[known]), self.form)
        except DataError:
            return False
        rise, sure = own.slope_at(MARGIN * d[-1])
        return rise > CLIMBING * sure


def still_climbs(d: Floats, gold: Floats, se: Floats) -> bool:
    """Whether the slope of the gold score over these rows is above 0 by `STILL` standard errors."""
    x = d - d.mean()
    size = float(x @ x)
    return size > 0 and float(x @ gold) > STILL * math.sqrt(float((x * x) @ (se * se)))


def lost(curve: Curve, d: float) -> float:
    """Share of the fitted curve's gain at its peak that is gone at ``d``: 0 before the peak."""
    peak = curve.peak
    if peak is None:  # it falls from the start, or never turns
        return 0.0 if curve.slope_at(max(d, 1e-3))[0] >= 0 else 1.0
    if d <= peak.d or peak.gain <= 0:
        return 0.0
    return max(0.0, (peak.score - curve.at(d)[0]) / peak.gain)


class Rising:
    """Weighted least squares under "never falls": ``misses`` is the weighted sum of squares that the best
    such sequence leaves, kept up to date by pooling adjacent violators (Ayer et al. 1955) from the right.
    """

    def __init__(self) -> None:
        self.misses = 0.0
        self._blocks: list[tuple[float, float]] = []  # mean, weight

    def take(self, y: float, weight: float) -> None:
        """Add one value with its weight (1 / se^2)."""
        mean = y
        while self._blocks and self._blocks[-1][0] > mean:
            before, heavy = self._blocks.pop()
            both = weight + heavy
            self.misses += weight * heavy / both * (before - mean) ** 2
            mean, weight = (mean * weight + before * heavy) / both, both
        self._blocks.append((mean, weight))


class _Since:
    """For every row a bet, begun there, that scores fall from there on: half of it foretold by a line over
    the rows since then, half by the row before."""

    def __init__(self) -> None:
        self._n = 0
        self._sums = np.zeros((0, 5))  # by start: weights, times t, t^2, y, t y
        self._log = np.zeros((0, 2))  # by start: of the line, of the row before
        self._before = (0.0, 1.0)
        self._rising: list[Rising] = []

    def take(self, y: float, se: float) -> None:
        """Foretell from every start that has seen two rows; then learn."""
        t, w = float(self._n), 1 / se**2
        weight, wt, wtt, wy, wty = self._sums.T
        size = weight * wtt - wt**2
        told = size > 1e-9 * np.maximum(weight * wtt, 1e-300)
        if told.any():
            one, a, b, c, e, det = (v[told] for v in (weight, wt, wtt, wy, wty, size))
            line = (b * c - a * e) / det + (one * e - a * c) / det * t
            spread = (b - 2 * a * t + one * t * t) / det * w  # of the foretold mean, in se^2
            off = (y - line) / se
            self._log[told, 0] -= 0.5 * (np.log1p(spread) + off**2 / (1 + spread))
            was, sure = self._before
            wide = 1 + (sure / se) ** 2
            self._log[told, 1] -= 0.5 * (math.log(wide) + ((y - was) / se) ** 2 / wide)
            for k in np.flatnonzero(told):
                self._rising[k].take(y, w)
        self._sums = np.vstack([self._sums, np.zeros(5)]) + w * np.array([1, t, t * t, y, t * y])
        self._log = np.vstack([self._log, np.zeros(2)])
        self._before = (y, se)
        self._rising.append(Rising())
        self._n += 1

    @property
    def foretold(self) -> Floats:
        """log of how well the rows since every start were foretold, without what the denominator has too."""
        both: Floats = np.logaddexp(self._log[:, 0], self._log[:, 1]) - math.log(2)
        return both

    @property
    def log_value(self) -> float:
        """log of the weighted sum; the weights of all starts there can ever be add up to at most 1."""
        k = np.arange(self._n)
        late = np.maximum(k - STARTS, 0)
        part = 1 / (STARTS + 1)
        shares = np.where(k < STARTS, part, part / ((late + 1) * (late + 2)))
        each = self.foretold + 0.5 * np.array([r.misses for r in self._rising]) + np.log(shares)
        return float(np.logaddexp.reduce(each))
