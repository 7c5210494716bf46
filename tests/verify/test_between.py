"""A test of two limits at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.verify.between import BetweenTest
from glasshouse.verify.sequential import SequentialTest


def run(p: float, n: int = 3000, seed: int = 0) -> BetweenTest:
    rng = np.random.default_rng(seed)
    return BetweenTest(0.6, "at_most", 0.05, 0.05, low=0.4).update((rng.random(n) < p).astype(float).tolist())


def test_inside_passes_and_outside_fails_on_either_side() -> None:
    assert [run(p).state for p in (0.5, 0.2, 0.8)] == ["pass", "fail", "fail"]


def test_at_a_limit_it_seldom_passes_and_seldom_fails() -> None:
    """At p = 0.6 the bound is just met: both errors are wrong there, each at most its level (5%)."""
    states = [run(0.6, 400, seed).state for seed in range(300)]
    assert states.count("pass") / 300 < 0.08 and states.count("fail") / 300 < 0.05


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=80))
def test_it_says_what_its_two_halves_say(stream: list[float]) -> None:
    low = SequentialTest(0.4, "at_least", 0.025, 0.05).update(stream)
    high = SequentialTest(0.6, "at_most", 0.025, 0.05).update(stream)
    both = BetweenTest(0.6, "at_most", 0.05, 0.05, low=0.4).update(stream)
    assert both.e_fail == pytest.approx((low.e_fail + high.e_fail) / 2, rel=1e-6)
    assert both.e_pass == pytest.approx(min(low.e_pass, high.e_pass))
    assert (both.state == "fail") == ("fail" in (low.state, high.state))
    assert (both.n, both.estimate) == (len(stream), pytest.approx(np.mean(stream)))
