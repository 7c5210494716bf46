"""The curve is fitted as a library fits it, its peak is where it falls, and its interval keeps its level."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize_scalar

from glasshouse.base.errors import DataError
from glasshouse.base.overopt import Form, basis, fit, scatter, slope

RNG = np.random.default_rng(0)
D = np.linspace(0.2, 5, 30)


def gold(form: Form, peak: float, gain: float = 1.0) -> np.ndarray:
    x = D / peak
    return gain * (x * (1 - np.log(x)) if form == "rl" else x * (2 - x))


@pytest.mark.parametrize("form", ["rl", "best_of_n"])
def test_the_fit_is_scipys(form: Form) -> None:
    se = RNG.uniform(0.02, 0.2, len(D))
    y = 3 + gold(form, 2.5) + se * RNG.standard_normal(len(D))
    power = (lambda d: np.log(d)) if form == "rl" else (lambda d: d)
    expected, cov = curve_fit(
        lambda d, c, a, b: c + d * (a - b * power(d)), D, y, p0=[0, 1, 1], sigma=se, absolute_sigma=True
    )
    found = fit(D, y, se, form)
    assert np.allclose(found.coefficients, expected, atol=1e-6)
    assert np.allclose(found.covariance, cov * max(found.misfit, 1), rtol=1e-4)


@pytest.mark.parametrize("form", ["rl", "best_of_n"])
def test_the_peak_is_where_the_curve_is_highest(form: Form) -> None:
    found = fit(D, 3 + gold(form, 2.5, 2.0), 0.1, form)
    top = minimize_scalar(lambda d: -found.at(d)[0], bounds=(0.1, 10), method="bounded")
    assert found.peak is not None
    assert found.peak.d == pytest.approx(2.5, rel=1e-6) == pytest.approx(top.x, rel=1e-3)
    assert found.peak.gain == pytest.approx(2.0) and found.peak.score == pytest.approx(5.0)
    step = 1e-5
    assert found.slope_at(4.0)[0] == pytest.approx(
        (found.at(4 + step)[0] - found.at(4 - step)[0]) / 2 / step, rel=1e-4
    )


@pytest.mark.parametrize("form", ["rl", "best_of_n"])
def test_the_interval_of_the_peak_holds_it_nineteen_times_in_twenty(form: Form) -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(400):
        peak = fit(D, gold(form, 2.5) + 0.1 * rng.standard_normal(len(D)), 0.1, form).peak
        held += peak is not None and peak.low <= 2.5 <= peak.high
    assert 0.92 <= held / 400 <= 0.985  # misfit above 1 widens some


def test_a_straight_rise_has_no_peak_or_one_without_an_end() -> None:
    peak = fit(D, D + 0.1 * RNG.standard_normal(len(D)), 0.1).peak
    assert peak is None or peak.high == math.inf
    assert fit(D, -gold("rl", 2.5), 0.1).peak is None


def test_the_beginning_of_a_curve_foretells_its_peak_within_its_interval() -> None:
    y = gold("rl", 3.0) + 0.01 * np.random.default_rng(1).standard_normal(len(D))
    early = D < 2.0
    peak = fit(D[early], y[early], 0.01).peak
    assert peak is not None and peak.low < 3.0 < peak.high < 6


def test_what_no_curve_goes_through_is_refused() -> None:
    with pytest.raises(DataError, match="at least 4"):
        fit([1, 2, 3], [1, 2, 3], 0.1)
    with pytest.raises(DataError, match="same distance"):
        fit([1, 1, 2, 2], [1, 2, 3, 4], 0.1)
    with pytest.raises(DataError, match="above 0"):
        fit([1, 2, 3, 4], [1, 2, 3, 4], 0.0)
    with pytest.raises(DataError, match="not negative"):
        fit([-1, 2, 3, 4], [1, 2, 3, 4], 0.1)


def test_at_no_distance_the_gain_is_nothing() -> None:
    assert basis(0.0).tolist() == [[1.0, 0.0, 0.0]] and np.isfinite(slope(0.0)).all()


def test_the_scatter_is_the_noises_and_not_the_trends() -> None:
    y = np.linspace(0, 3, 500) + 0.2 * np.random.default_rng(2).standard_normal(500)
    assert scatter(y) == pytest.approx(0.2, rel=0.15)
    assert scatter([1.0, 1.0, 1.0]) > 0
