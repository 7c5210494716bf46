"""Ranks among clean twins: exact by counting permutations, and no stronger than their number allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from glasshouse.base.errors import VerificationError
from glasshouse.verify.conformal import dealt, farthest, normal, p_value

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=6)


@given(SCORES)
def test_over_all_orders_of_runs_a_clean_one_is_rare_no_more_often_than_its_p_value_says(
    scores: list[float],
) -> None:
    """By brute force: each of the runs, ties among them too, may equally be the one that is judged."""
    p = [p_value(order[0], order[1:]) for order in itertools.permutations(scores)]
    for level in {*p, 0.05, 0.5}:
        assert np.mean([x <= level + 1e-12 for x in p]) <= level + 1e-12
    assert min(p) >= 1 / len(scores)


@given(SCORES, st.floats(-6, 6), st.floats(0, 5))
def test_farther_is_never_less_rare_and_the_order_of_twins_is_nothing(
    twins: list[float], score: float, more: float
) -> None:
    assert p_value(score + more, twins) <= p_value(score, twins)
    assert p_value(score, twins[::-1]) == p_value(score, twins)


@pytest.mark.parametrize("law", ["normal", "heavy", "dependent"])
def test_a_clean_run_leaves_the_envelope_at_any_of_its_gates_no_more_often_than_declared(law: str) -> None:
    """Twenty quantities, eight gates, nineteen ranked twins: level 1/20 for the run, not for a gate."""
    rng, runs, outside = np.random.default_rng(8), 600, 0
    for _ in range(runs):
        x = rng.standard_t(1.5, (25, 8, 20)) if law == "heavy" else rng.normal(size=(25, 8, 20))
        if law == "dependent":  # a run keeps its ways from gate to gate
            x = 0.3 * x + rng.normal(size=(25, 1, 20)) * np.exp(rng.normal(size=(25, 1, 1)))
        fitted, ranked, held = dealt(25)
        score = farthest(
            {str(g): np.abs(normal(x[list(fitted), g]).z(x[:, g])).max(1).tolist() for g in range(8)}
        )
        twins = score[list(ranked)]
        gates = [
            p_value(float(np.abs(normal(x[list(fitted), g]).z(x[held, g])).max()), twins) for g in range(8)
        ]
        outside += min(gates) <= 0.05
    assert len(ranked) == 19
    assert binomtest(outside, runs, 0.05, "greater").pvalue > 0.001, outside / runs
    assert outside > 0.02 * runs  # and it is not so wide that nothing ever leaves it


def test_twins_are_dealt_once_and_none_is_used_twice() -> None:
    for n in range(5, 60):
        fitted, ranked, held = dealt(n)
        assert sorted([*fitted, *ranked, held]) == list(range(n)) and len(fitted) >= 3 and len(ranked) >= 1
    for n, fit in ((4, None), (5, 4), (9, 2)):
        with pytest.raises(VerificationError, match="clean twins"):
            dealt(n, fit)


def test_what_does_not_vary_among_twins_is_not_infinitely_unusual() -> None:
    known = normal(np.zeros((5, 3)))
    assert np.isfinite(known.z(np.array([0.01, 0.0, -0.01]))).all()
    with pytest.raises(ValueError, match="NaN"):
        p_value(float("nan"), [1.0])
