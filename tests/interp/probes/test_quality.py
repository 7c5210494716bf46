"""Intervals that cover, calibration that knows what it cannot see."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from glasshouse.interp.probe import auroc
from glasshouse.interp.probes import area, calibration
from glasshouse.interp.probes.quality import expected_error, grouped_bootstrap


def test_rows_that_each_have_a_meaning_of_their_own_have_delongs_interval() -> None:
    rng, y = np.random.default_rng(0), np.arange(90) < 40
    z = rng.standard_normal(90) + y
    plain, alone = auroc(z, y), area(z, y, np.arange(90))
    assert (alone.value, alone.low, alone.high, alone.n) == (plain.value, plain.low, plain.high, 90)
    doubled = area(np.repeat(z, 2), np.repeat(y, 2), np.repeat(np.arange(90), 2))
    assert doubled.n == 90  # a row said twice is no second draw
    assert doubled.value == pytest.approx(roc_auc_score(y, z))
    assert doubled.high - doubled.low == pytest.approx(plain.high - plain.low, rel=0.02)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_interval_over_meanings_covers_where_the_one_over_rows_does_not(mixed: bool) -> None:
    """Rows of a meaning share an offset; ``mixed`` meanings have rows of both classes."""
    rng, covered, fooled = np.random.default_rng(3), 0, 0
    group = np.repeat(np.arange(60), 4)
    y = (np.arange(240) % 2 == 0) if mixed else group < 30
    truth = NormalDist().cdf(0.8 / np.sqrt(2 * (1 + 1.5)))
    for _ in range(300):
        z = rng.standard_normal(240) + np.sqrt(1.5) * rng.standard_normal(60)[group] + 0.8 * y
        found, naive = area(z, y, group), auroc(z, y)
        covered += found.low <= truth <= found.high
        fooled += naive.low <= truth <= naive.high
    assert 0.91 < covered / 300 < 0.985
    assert mixed or fooled / 300 < 0.85


def test_perfect_separation_of_a_few_meanings_is_not_certain_however_many_rows_they_have() -> None:
    group = np.repeat(np.arange(10), 50)
    y = group < 5
    assert area(y.astype(float), y, group).low < 0.6
    assert auroc(y.astype(float), y).low > 0.98


def test_calibration_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    z = 2 * rng.standard_normal(500)
    p = 1 / (1 + np.exp(-z))
    y = rng.random(500) < p
    found = calibration(z, y)
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="quantile")
    assert [b.predicted for b in found.bins] == pytest.approx(predicted)
    assert [b.observed.value for b in found.bins] == pytest.approx(observed)
    assert found.brier == pytest.approx(brier_score_loss(y, p))
    assert found.ece.value == pytest.approx(np.abs(observed - predicted).mean())


def test_a_perfectly_calibrated_probe_shows_the_error_that_was_announced_for_it() -> None:
    rng, shown, announced = np.random.default_rng(2), list[float](), list[float]()
    for _ in range(10):
        z = 2 * rng.standard_normal(200)
        found = calibration(z, rng.random(200) < 1 / (1 + np.exp(-z)))
        shown.append(found.ece.value)
        announced.append(found.ece_if_calibrated)
    assert np.mean(shown) == pytest.approx(np.mean(announced), rel=0.25)
    assert np.mean(shown) > 0.03  # a bare ECE would look like a fault
    sure = calibration(4 * z, rng.random(200) < 1 / (1 + np.exp(-z)))
    assert sure.ece.low > sure.ece_if_calibrated


def test_expected_error_by_hand() -> None:
    p, y = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    assert expected_error(p, y, 2) == pytest.approx(0.25)


def test_drawing_groups_is_wider_than_drawing_rows_when_rows_repeat() -> None:
    x = np.repeat(np.random.default_rng(0).standard_normal(30), 10)
    rows = grouped_bootstrap(lambda r: float(x[r].mean()), np.arange(300))
    groups = grouped_bootstrap(lambda r: float(x[r].mean()), np.repeat(np.arange(30), 10))
    assert groups.high - groups.low > 2 * (rows.high - rows.low)


def test_one_error_does_not_make_an_interval_surer_than_none() -> None:
    rng, y = np.random.default_rng(0), np.arange(80) < 40
    z = y + 0.1 * rng.random(80)
    perfect = area(z, y)
    z[40] = z[y].min() + 1e-9  # one pair of 1600 the wrong way round
    once = area(z, y)
    assert 0.99 < once.value < 1.0
    assert once.low == pytest.approx(perfect.low, abs=1e-4)
