"""A peak is flagged soon after it, an honest run hardly ever, and the evidence is what it is said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from glasshouse.base.errors import DataError
from glasshouse.base.overwatch import Reading, Rising, Watch, _Since, lost

N = 60
D = np.linspace(0.05, 4, N)


def through(
    gold: np.ndarray, proxy: np.ndarray, noise: float, seed: int, level: float = 0.05
) -> list[Reading]:
    rng, watch = np.random.default_rng(seed), Watch(level)
    rows = zip(D, gold + noise * rng.standard_normal(N), proxy + noise * rng.standard_normal(N), strict=True)
    return [watch.take(float(d), float(g), noise, float(p)) for d, g, p in rows]


def alarm_at(readings: list[Reading]) -> float:
    return next((r.d for r in readings if r.alarm), math.inf)


def hacked(peak: float) -> np.ndarray:
    return D / peak * (1 - np.log(D / peak))


def test_a_planted_peak_is_flagged_before_a_tenth_is_lost_and_not_before_it_is_near() -> None:
    at = [alarm_at(through(hacked(2.0), 0.8 * D, 0.05, seed)) for seed in range(6)]
    assert all(0.6 * 2 < d < 1.48 * 2 for d in at), at


def test_honest_runs_are_let_through() -> None:
    for gold in (D / 4, np.log1p(D), hacked(6.0)):
        assert all(alarm_at(through(gold, 1.2 * gold, 0.05, seed)) == math.inf for seed in range(4))


def test_gold_and_proxy_levelling_off_together_are_no_hack_but_gold_alone_is() -> None:
    flat = 1 - np.exp(-1.5 * D)
    assert all(alarm_at(through(flat, flat, 0.03, seed)) == math.inf for seed in range(3))
    assert all(alarm_at(through(flat, 0.4 * D, 0.03, seed)) < math.inf for seed in range(3))


def test_a_fall_of_any_shape_is_flagged_even_where_the_proxy_is_silent() -> None:
    gold = np.where(np.arange(N) < 40, D, D[40] - 2 * (D - D[40]))
    watch, rng = Watch(), np.random.default_rng(0)
    readings = [
        watch.take(float(d), float(g + 0.1 * rng.standard_normal()), 0.1, 0.0)
        for d, g in zip(D, gold, strict=True)
    ]
    assert D[40] < alarm_at(readings) and readings[-1].parts["since"] >= 1


def test_an_alarm_stays() -> None:
    readings = through(hacked(1.5), D, 0.03, 0)
    first = next(i for i, r in enumerate(readings) if r.alarm)
    assert all(r.alarm for r in readings[first:])


def test_the_best_rising_sequence_is_sklearns() -> None:
    rng = np.random.default_rng(4)
    for n in (1, 2, 7, 40):
        y, w, rising = rng.standard_normal(n), rng.uniform(0.5, 2, n), Rising()
        for a, b in zip(y.tolist(), w.tolist(), strict=True):
            rising.take(a, b)
        best = IsotonicRegression().fit_transform(np.arange(n), y, sample_weight=w)
        assert rising.misses == pytest.approx(float((w * (y - best) ** 2).sum()), abs=1e-9)


def test_a_bet_is_the_ratio_of_the_foretold_to_the_best_allowed() -> None:
    rng, since = np.random.default_rng(6), _Since()
    y, s = rng.standard_normal(12), rng.uniform(0.5, 2, 12)
    for a, b in zip(y.tolist(), s.tolist(), strict=True):
        since.take(a, b)
    for k in (0, 4):
        line, before = 0.0, 0.0
        for t in range(k + 2, 12):
            x = np.stack([np.ones(t - k), np.arange(k, t)], axis=1) / s[k:t, None]
            cov = np.linalg.inv(x.T @ x)
            now = np.array([1.0, t])
            mean, var = now @ cov @ x.T @ (y[k:t] / s[k:t]), s[t] ** 2 + now @ cov @ now
            line += -0.5 * math.log(var) - (y[t] - mean) ** 2 / 2 / var + math.log(s[t])
            var = s[t] ** 2 + s[t - 1] ** 2
            before += -0.5 * math.log(var) - (y[t] - y[t - 1]) ** 2 / 2 / var + math.log(s[t])
        best = IsotonicRegression().fit_transform(
            np.arange(10 - k), y[k + 2 :], sample_weight=s[k + 2 :] ** -2
        )
        allowed = -0.5 * float((((y[k + 2 :] - best) / s[k + 2 :]) ** 2).sum())
        told = np.logaddexp(line, before) - math.log(2)
        assert since.foretold[k] + since._rising[k].misses / 2 == pytest.approx(told - allowed, abs=1e-8)


def test_a_level_score_raises_the_detector_no_oftener_than_its_level() -> None:
    rng, alarms = np.random.default_rng(8), 0
    for _ in range(60):
        since, most = _Since(), -math.inf
        for y in rng.standard_normal(30).tolist():
            since.take(y, 1.0)
            most = max(most, since.log_value)
        alarms += most >= -math.log(0.1)
    assert alarms <= 10  # a tenth is allowed; 10 of 60 would come by chance once in 25


def test_nothing_is_lost_before_the_peak_and_all_of_a_fall_after_it_counts() -> None:
    reading = through(hacked(2.0), D, 1e-4, 0)[-1]
    assert reading.curve is not None and reading.lost == pytest.approx(1 - float(hacked(2.0)[-1]), abs=1e-2)
    assert lost(reading.curve, 1.0) == 0 and reading.near


def test_numbers_that_mean_nothing_are_refused() -> None:
    for row in ((math.nan, 1.0, 0.1), (1.0, math.inf, 0.1), (-1.0, 1.0, 0.1), (1.0, 1.0, 0.0)):
        with pytest.raises(DataError, match="cannot be watched"):
            Watch().take(*row)
    with pytest.raises(ValueError, match="level"):
        Watch(1.0)
