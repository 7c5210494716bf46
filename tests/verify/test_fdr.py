"""E-values from p-values and several at once: checked by brute force, by integration and against scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import false_discovery_control, norm

from glasshouse.verify.fdr import at_level, calibrate, calibrate_mixture, e_bh, merge, twins_needed

VALUES = st.lists(st.one_of(st.floats(0, 200), st.sampled_from([10.0, 20.0, 40.0])), min_size=1, max_size=7)
LEVEL = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5])


def named(values: list[float]) -> dict[str, float]:
    return {f"c{i}": v for i, v in enumerate(values)}


@given(VALUES, LEVEL)
def test_e_bh_is_the_largest_self_consistent_set(values: list[float], level: float) -> None:
    """Wang & Ramdas: the union of all sets R in which every e-value is at least K / (|R| level)."""
    sets = [
        r
        for k in range(len(values) + 1)
        for r in itertools.combinations(range(len(values)), k)
        if all(values[i] * len(r) * level >= len(values) for i in r)
    ]
    largest = max(sets, key=len)
    found = e_bh(named(values), level)
    assert sorted(values[int(name[1:])] for name in found) == sorted(values[i] for i in largest)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30), st.sampled_from([0.0123, 0.0517, 0.1009]))
def test_on_reciprocal_p_values_it_is_benjamini_and_hochberg(p: list[float], level: float) -> None:
    adjusted = false_discovery_control(p)
    if np.any(np.abs(adjusted - level) < 1e-9):
        return
    assert set(e_bh(named([1 / x for x in p]), level)) == {
        f"c{i}" for i, a in enumerate(adjusted) if a <= level
    }


@given(VALUES, LEVEL, st.data())
def test_more_evidence_never_rejects_less_and_order_does_not_matter(
    values: list[float], level: float, data: st.DataObject
) -> None:
    before = set(e_bh(named(values), level))
    at = data.draw(st.integers(0, len(values) - 1))
    more = [v + (10 if i == at else 0) for i, v in enumerate(values)]
    assert before <= set(e_bh(named(more), level))
    turned = dict(reversed(list(named(values).items())))
    assert set(e_bh(turned, level)) == before


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99])
def test_false_discoveries_stay_below_the_level_whatever_the_dependence(correlation: float) -> None:
    """16 true nulls of 20 that share a cause; likelihood ratios of a normal mean are e-values exactly."""
    rng, level, shift, runs = np.random.default_rng(5), 0.2, 3.0, 2000
    null = np.arange(20) < 16
    shared, own = rng.normal(size=(runs, 1)), rng.normal(size=(runs, 20))
    x = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own + shift * ~null
    e = np.exp(shift * x - shift**2 / 2)
    assert quad(lambda z: math.exp(shift * z - shift**2 / 2) * norm.pdf(z), -12, 15)[0] == pytest.approx(1)
    wrong, found = [], 0
    for row in e:
        rejected = [int(name[1:]) for name in e_bh(named(row.tolist()), level)]
        wrong.append(sum(null[rejected]) / max(len(rejected), 1))
        found += len(rejected) - int(sum(null[rejected]))
    assert np.mean(wrong) <= level * 0.8 + 3 * np.std(wrong) / math.sqrt(runs)
    assert found > 0.3 * runs * 4


@pytest.mark.parametrize("f", [lambda p: calibrate(p, 0.3), calibrate, calibrate_mixture])
def test_a_calibrator_is_one_on_average_over_uniform_p_values_and_falls(f: object) -> None:
    assert callable(f)
    total = quad(lambda s: f(math.exp(-s)) * math.exp(-s), 0, 60, limit=400)[0]  # p = exp(-s)
    if f is calibrate_mixture:  # its tail is heavy: 1/s of its mass lies beyond s
        total += 1 / 60
    assert total == pytest.approx(1, abs=2e-3)
    values = [f(p) for p in np.geomspace(1e-12, 1, 200)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    assert all(f(p) <= 1 / p for p in np.geomspace(1e-9, 1, 50))


def test_the_mixture_is_the_mean_of_the_family() -> None:
    for p in (1e-6, 0.03, 0.4, 0.99, 0.99995, 1.0):
        mean = quad(lambda k, p=p: k * p ** (k - 1), 0, 1)[0]
        assert calibrate_mixture(p) == pytest.approx(mean, rel=1e-6)


@example(19, 0.05)
@example(99, 0.01)
@example(18, 0.05)
@given(st.integers(1, 200), st.sampled_from([0.01, 0.03, 0.05, 0.1, 0.3]))
def test_all_or_nothing_is_an_e_value_on_ranks_and_reaches_the_level_exactly_when_twins_suffice(
    n: int, level: float
) -> None:
    ranks = [(k + 1) / (n + 1) for k in range(n + 1)]  # p-values of a run that is like its n twins
    e = [at_level(p, level) for p in ranks]
    assert np.mean(e) <= 1 + 1e-12
    assert (max(e) >= 1 / level - 1e-9) == (n >= twins_needed(level))


@given(VALUES)
def test_merging_is_the_mean_in_any_order(values: list[float]) -> None:
    assert merge(values) == pytest.approx(np.mean(values))
    assert merge(values[::-1]) == pytest.approx(merge(values))
    assert merge([*values, 5.0], [1.0] * len(values) + [0.0]) == pytest.approx(merge(values))


def test_senseless_input_is_refused() -> None:
    with pytest.raises(ValueError, match="never negative"):
        e_bh({"a": -1.0}, 0.1)
    with pytest.raises(ValueError, match="never negative"):
        e_bh({"a": math.nan}, 0.1)
    with pytest.raises(ValueError, match="strictly between"):
        e_bh({"a": 1.0}, 1.0)
    for f in (calibrate, calibrate_mixture, lambda p: at_level(p, 0.1), twins_needed):
        for p in (0.0, -0.1, 1.5, math.nan):
            with pytest.raises(ValueError, match="lies in"):
                f(p)
    with pytest.raises(ValueError, match="kappa"):
        calibrate(0.1, 1.0)
    for bad in ([], [-1.0], [math.nan]):
        with pytest.raises(ValueError, match="merging"):
            merge(bad)
    assert e_bh({}, 0.1) == ()
