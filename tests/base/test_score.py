"""Rates against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from glasshouse.base.score import bootstrap, rate


@given(st.data(), st.integers(1, 5000), st.sampled_from([0.8, 0.95, 0.99]))
def test_a_rate_has_wilsons_interval(data: st.DataObject, n: int, level: float) -> None:
    k = data.draw(st.integers(0, n))
    found = rate(k, n, level)
    theirs = binomtest(k, n).proportion_ci(level, method="wilson")
    assert found.value == k / n and found.n == n
    assert found.low == pytest.approx(theirs.low, abs=1e-9)
    assert found.high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_nought_of_a_few_is_not_known_to_be_nought() -> None:
    assert rate(0, 10).high > 0.25
    assert str(rate(0, 10)) == "0.000 [0.000, 0.278] (n=10)"


@pytest.mark.parametrize("n", [0, -1])
def test_a_rate_of_nothing_is_an_error(n: int) -> None:
    with pytest.raises(ValueError, match="n is 0"):
        rate(0, n)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    scores = [bootstrap(rng.exponential(size=60), seed=i, draws=300) for i in range(200)]
    covered = np.mean([s.low <= 1 <= s.high for s in scores])
    assert 0.87 <= covered <= 0.98  # 95% less the known shortfall on skewed values
    with pytest.raises(ValueError, match="1 not finite"):
        bootstrap([1.0, math.nan])
