"""The sequential test keeps its error levels whenever one stops looking, and decides in reasonable time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.verify.sequential import BETS, PASS_BETS, SequentialTest, Side

UNIT = st.floats(0, 1, allow_nan=False)
BOUND = st.floats(0.01, 0.99)
SIDES: tuple[Side, Side] = ("at_most", "at_least")


def crossings(x: np.ndarray, bound: float, side: Side, against_kept: bool, alpha: float) -> np.ndarray:
    """Whether each stream [stream, time] ever drives an e-value to 1/alpha: wealth of bets, written anew."""
    y, m = (x, bound) if side == "at_most" else (1 - x, 1 - bound)
    wealth = np.zeros(x.shape)
    bets = (
        (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9) if against_kept else (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99)
    )
    for bet in bets:
        factor = 1 + bet * (y - m) / m if against_kept else 1 - bet * (y - m) / (1 - m)
        wealth += np.cumprod(factor, axis=1) * (1 / 7 if against_kept else bet / 3.79)
    return (wealth >= 1 / alpha).any(axis=1)


@given(st.lists(UNIT, min_size=1, max_size=40), BOUND, st.sampled_from(SIDES))
def test_e_values_are_averaged_products_of_bets(stream: list[float], bound: float, side: Side) -> None:
    test = SequentialTest(bound, side, 1e-9, 1e-9).update(stream)
    room = bound if side == "at_most" else 1 - bound
    above = [x - bound if side == "at_most" else bound - x for x in stream]
    fail = [math.prod(1 + bet * a / room for a in above) for bet in BETS]
    win = [math.prod(1 - bet * a / (1 - room) for a in above) for bet in PASS_BETS]
    assert test.e_fail == pytest.approx(min(np.mean(fail), math.exp(27.6)), rel=1e-6)
    assert test.e_pass == pytest.approx(
        min(np.average(win, weights=PASS_BETS), math.exp(27.6)), rel=1e-6, abs=1e-300
    )
    assert test.n == len(stream) and test.estimate == pytest.approx(np.mean(stream))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5, 0.9])
def test_wrong_decisions_at_the_bound_are_rarer_than_the_error_level(bound: float, side: Side) -> None:
    """A mean exactly on the bound is the hardest truth for both nulls; the streams are looked at after every
    outcome, 1000 of them."""
    alpha, streams = 0.05, 2000
    for kind in ("two-valued", "spread"):
        rng = np.random.default_rng(7)
        if kind == "two-valued":
            x = (rng.random((streams, 1000)) < bound).astype(float)
        else:
            x = rng.beta(2 * bound, 2 * (1 - bound), (streams, 1000))
        for against_kept in (True, False):
            wrong = crossings(x, bound, side, against_kept, alpha).mean()
            assert wrong <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / streams), (kind, against_kept)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("against_kept", [True, False])
def test_over_all_streams_wealth_is_one_on_average_and_ville_holds_exactly(
    side: Side, against_kept: bool
) -> None:
    """All 2^9 binary streams of nine, weighted by their chance at a mean on the bound, in fractions."""
    n, bound = 9, Fraction(1, 3)
    grid = [Fraction(b).limit_denominator(100) for b in (BETS if against_kept else PASS_BETS)]
    parts = [Fraction(1, 7)] * 7 if against_kept else [b / sum(grid) for b in grid]
    mean = crossed = Fraction(0)
    for stream in itertools.product((0, 1), repeat=n):
        chance = bound ** sum(stream) * (1 - bound) ** (n - sum(stream))
        wealth, highest = list(parts), Fraction(0)
        for x in stream:
            y, m = (x, bound) if side == "at_most" else (1 - x, 1 - bound)
            up = [b * (y - m) / m if against_kept else -b * (y - m) / (1 - m) for b in grid]
            wealth = [w * (1 + u) for w, u in zip(wealth, up, strict=True)]
            highest = max(highest, sum(wealth, Fraction(0)))
        mean += chance * sum(wealth, Fraction(0))
        crossed += chance * (highest >= 5)
        levels = (0.2, 1e-300) if against_kept else (1e-300, 0.2)
        test = SequentialTest(1 / 3, side, *levels).update([float(x) for x in stream])
        assert (test.state != "undecided") == (highest >= 5)
    assert mean == 1
    assert 0 < crossed <= Fraction(1, 5)


def test_the_simulated_e_process_is_the_products() -> None:
    """So that the simulation above judges `SequentialTest` and not a look-alike."""
    rng = np.random.default_rng(3)
    decided = 0
    for _ in range(60):
        x, side = (rng.random(400) < rng.choice([0.02, 0.1, 0.3])).astype(float), SIDES[int(rng.integers(2))]
        bound = 0.1 if side == "at_most" else 0.9
        x = x if side == "at_most" else 1 - x
        test = SequentialTest(bound, side, 0.05, 1e-300).update(x.tolist())
        assert (test.state == "fail") == crossings(x[None], bound, side, True, 0.05)[0]
        test_pass = SequentialTest(bound, side, 1e-300, 0.05).update(x.tolist())
        assert (test_pass.state == "pass") == crossings(x[None], bound, side, False, 0.05)[0]
        decided += test.state == "fail" or test_pass.state == "pass"
    assert decided > 20


@pytest.mark.parametrize(
    ("bound", "alpha", "most"), [(0.05, 0.01, 110), (0.01, 0.01, 560), (0.2, 0.0025, 40), (0.5, 0.002, 17)]
)
def test_outcomes_without_a_bad_one_pass_in_good_time(bound: float, alpha: float, most: int) -> None:
    test = SequentialTest(bound, "at_most", 0.01, alpha)
    while test.state == "undecided":
        test.update([0.0])
    needed = test.n
    assert test.state == "pass"
    assert needed <= most
    least = math.log(1 / alpha) / -math.log(1 - bound)  # no test of this level can be faster
    assert least <= needed <= 1.7 * least


@pytest.mark.parametrize(("rate", "most"), [(1.0, 10), (0.5, 40), (0.3, 120)])
def test_a_broken_bound_fails_in_good_time(rate: float, most: int) -> None:
    rng = np.random.default_rng(0)
    needed = []
    for _ in range(50):
        test = SequentialTest(0.1, "at_most", 0.001, 0.01)
        while test.state == "undecided":
            test.update([float(rng.random() < rate)])
        assert test.state == "fail"
        needed.append(test.n)
    assert np.mean(needed) < most


@given(st.lists(st.sampled_from([0.0, 1.0]), max_size=300), BOUND, st.sampled_from(SIDES), st.data())
def test_a_decision_stays_and_does_not_depend_on_how_outcomes_are_grouped(
    stream: list[float], bound: float, side: Side, data: st.DataObject
) -> None:
    whole = SequentialTest(bound, side, 0.05, 0.05).update(stream)
    cut = data.draw(st.integers(0, len(stream)))
    parts = SequentialTest(bound, side, 0.05, 0.05).update(stream[:cut])
    early = parts.state
    parts.update(stream[cut:])
    assert (parts.state, parts.n, parts.total) == (whole.state, whole.n, whole.total)
    assert (parts.e_fail, parts.e_pass) == (whole.e_fail, whole.e_pass)
    assert early in ("undecided", parts.state)


def test_the_two_sides_are_mirror_images() -> None:
    stream = [0.0, 1.0, 0.25, 0.0, 0.0]
    low = SequentialTest(0.3, "at_most", 0.01, 0.02).update(stream)
    high = SequentialTest(0.7, "at_least", 0.01, 0.02).update([1 - x for x in stream])
    assert low.e_fail == pytest.approx(high.e_fail) and low.e_pass == pytest.approx(high.e_pass)


def test_nothing_seen_decides_nothing() -> None:
    test = SequentialTest(0.5, "at_most", 0.01, 0.01)
    assert (test.state, test.n, test.e_fail, test.e_pass) == ("undecided", 0, 1.0, 1.0)
    assert math.isnan(test.estimate)


@pytest.mark.parametrize(
    ("bound", "alpha"), [(0.0, 0.1), (1.0, 0.1), (0.5, 0.0), (0.5, 1.0), (math.nan, 0.1)]
)
def test_senseless_bounds_and_levels_are_refused(bound: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="strictly between"):
        SequentialTest(bound, "at_most", alpha, 0.1)


@pytest.mark.parametrize("outcome", [-0.1, 1.1, math.nan, math.inf])
def test_outcomes_outside_the_unit_interval_are_refused(outcome: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        SequentialTest(0.5, "at_most", 0.1, 0.1).update([outcome])
