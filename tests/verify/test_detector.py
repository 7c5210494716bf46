"""A detector over gates sees drift that none shows alone, and raises no more false alarms than declared."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from glasshouse.base.canonical import canonical_json
from glasshouse.base.errors import VerificationError
from glasshouse.verify.between import BetweenTest
from glasshouse.verify.detector import Detector, Form, follow, together
from glasshouse.verify.examination import Finding, Surroundings, error_share, from_test
from glasshouse.verify.sequential import PASS_BETS, SequentialTest

FORMS: tuple[Form, Form] = ("sum", "max")
GATES = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), min_size=1, max_size=8)
EXACT_BETS = [Fraction(b).limit_denominator(100) for b in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)]


def stakes(outcomes: list[float], bound: float = 0.25) -> np.ndarray:
    return SequentialTest(bound, "at_most", 0.01, 0.01).update(outcomes).stakes


def run(gates: list[list[float]], form: Form, levels: list[float], bound: float = 0.25) -> Detector:
    detector = Detector(form)
    for k, outcomes in enumerate(gates):
        detector.take(k, stakes(outcomes, bound), levels[k])
    return detector


def by_definition(gates: list[list[int]], levels: list[Fraction], bound: Fraction, form: Form) -> Fraction:
    """The value, from the e-processes started at every gate, without a recursion and in exact fractions."""
    total = Fraction(0)
    for bet in EXACT_BETS:
        started = []
        for j in range(len(gates)):
            wealth = levels[j]
            for x in itertools.chain(*gates[j:]):
                wealth *= 1 + bet / bound * (x - bound)
            started.append(wealth)
        total += sum(started, Fraction(0)) if form == "sum" else max(started)
    return total / len(EXACT_BETS)


@given(GATES, st.sampled_from(FORMS), st.lists(st.floats(1e-9, 1e-7), min_size=8, max_size=8))
def test_the_recursion_is_the_sum_or_maximum_of_e_processes_started_at_every_gate(
    gates: list[list[float]], form: Form, levels: list[float]
) -> None:
    detector, restarted = Detector(form), False
    for k, outcomes in enumerate(gates):
        restarted |= detector.take(k, stakes(outcomes), levels[k])
    exact = by_definition(
        [[int(x) for x in g] for g in gates], [Fraction(v) for v in levels], Fraction(1, 4), form
    )
    if not restarted:
        assert detector.value == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_over_all_streams_the_expected_number_of_alarms_is_at_most_the_levels_exactly(form: Form) -> None:
    """Every one of the 2^9 ways that three gates of three outcomes can come out, at a mean on the bound."""
    bound, per_gate, n = Fraction(1, 4), 3, 3
    levels = [Fraction(1, 20)] * n
    ways = list(itertools.product((0, 1), repeat=per_gate))
    chance = {w: bound ** sum(w) * (1 - bound) ** (per_gate - sum(w)) for w in ways}
    expected = anywhere = whole = Fraction(0)
    for gates in itertools.product(ways, repeat=n):
        p = math.prod((chance[g] for g in gates), start=Fraction(1))
        began, alarms = 0, 0
        for k in range(1, n + 1):
            if by_definition([list(g) for g in gates[began:k]], levels[began:k], bound, form) >= 1:
                began, alarms = k, alarms + 1
        expected += p * alarms
        anywhere += p * (alarms > 0)
        whole += p
        ours = run([[float(x) for x in g] for g in gates], form, [float(v) for v in levels])
        assert len(ours.alarms) == alarms
    assert whole == 1
    assert 0 < anywhere <= expected <= sum(levels)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_four_hundred_gates_has_a_false_alarm_no_more_often_than_declared(form: Form) -> None:
    """The mean exactly on the bound. The exact binomial test would reject a rate of 5% at 1 in 1000."""
    runs, planned, n, bound = 400, 400, 64, 0.05
    counts = np.random.default_rng(20).binomial(n, bound, (runs, planned))
    won = np.stack([stakes([1.0] * k + [0.0] * (n - k), bound) for k in range(counts.max() + 1)])
    alarmed = 0
    for row in counts:
        detector = Detector(form)
        for k, count in enumerate(row):
            if detector.take(k, won[count], error_share(0.05, k, planned)):
                alarmed += 1
                break
    assert binomtest(alarmed, runs, 0.05, "greater").pvalue > 0.001, alarmed / runs


@given(GATES, st.sampled_from(FORMS), st.data())
def test_going_on_from_a_state_read_back_is_never_having_stopped(
    gates: list[list[float]], form: Form, data: st.DataObject
) -> None:
    whole = run(gates, form, [0.01] * len(gates))
    cut = data.draw(st.integers(0, len(gates)))
    first = run(gates[:cut], form, [0.01] * cut)
    written = canonical_json(first.state())
    assert len(written) < 1200
    again = Detector.resume(json.loads(written))
    for k in range(cut, len(gates)):
        again.take(k, stakes(gates[k]), 0.01)
    assert again.state() == whole.state()


@given(GATES, st.sampled_from(FORMS), st.data())
def test_outcomes_of_one_gate_count_in_any_order_and_a_worse_one_counts_more(
    gates: list[list[float]], form: Form, data: st.DataObject
) -> None:
    levels = [1e-9] * len(gates)
    shuffled = [data.draw(st.permutations(g)) for g in gates]
    value = run(gates, form, levels).log_value
    assert run(shuffled, form, levels).log_value == pytest.approx(value, rel=1e-9)
    at = data.draw(st.integers(0, len(gates) - 1))
    worse = [g if k != at else [1.0, *g[1:]] for k, g in enumerate(gates)]
    if not run(worse, form, levels).alarms:
        assert run(worse, form, levels).log_value >= value - 1e-9


@given(GATES)
def test_the_maximum_never_exceeds_the_sum(gates: list[list[float]]) -> None:
    levels = [1e-9] * len(gates)
    assert run(gates, "max", levels).log_value <= run(gates, "sum", levels).log_value + 1e-12


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60), st.floats(1e-4, 0.1))
def test_a_gate_whose_own_test_fails_has_raised_the_detector_too(outcomes: list[float], level: float) -> None:
    """Looked at after every outcome, as the test is: so one sum of levels bounds both."""
    for k in range(1, len(outcomes) + 1):
        test = SequentialTest(0.25, "at_most", level, 0.01).update(outcomes[:k])
        if test.state == "fail":
            assert Detector().take(0, test.stakes, level * (1 + 1e-9))
            return


def test_drift_that_no_gate_shows_is_seen_and_dated() -> None:
    rng, detector, alone = np.random.default_rng(4), Detector(), 0
    for k in range(60):
        rate = 0.02 if k < 30 else 0.12
        test = SequentialTest(0.05, "at_most", error_share(0.01, k, 60), 1e-12)
        test.update((rng.random(64) < rate).astype(float).tolist())
        alone += test.state == "fail"
        if detector.take(k, test.stakes, error_share(0.01, k, 60)):
            break
        since = detector.since
    assert alone == 0 and 32 <= k <= 44
    assert since is not None and abs(since - 30) <= 2


def test_two_limits_are_watched_at_once() -> None:
    for rate, alarmed in ((0.9, True), (0.1, True), (0.5, False)):
        rng, detector = np.random.default_rng(1), Detector()
        for k in range(20):
            test = BetweenTest(0.7, "at_most", 0.001, 0.01, low=0.3)
            detector.take(k, test.update((rng.random(12) < rate).astype(float).tolist()).stakes, 0.0005)
        assert bool(detector.alarms) == alarmed


# -- in a gate -----------------------------------------------------------------------------------------------


def exam(gate: int, kept: dict[str, Any], every: int = 1) -> Any:
    return SimpleNamespace(
        seed=("recipe", "constraint", "digest", str(gate)),
        alpha_fail=error_share(0.01, gate, 40),
        around=Surroundings(kept=kept),
        constraint=SimpleNamespace(every=every),
    )


def finding(rate: float, gate: int, n: int = 40, **more: Any) -> Finding:
    """A gate too small to decide: ``n`` outcomes with bad ones spread evenly."""
    outcomes = [float(int((i + 1) * rate + 1e-9) > int(i * rate + 1e-9)) for i in range(n)]
    test = SequentialTest(0.05, "at_most", error_share(0.01, gate, 40), 1e-12)
    return from_test(test.update(outcomes), **more)


def after(rates: list[float], make: Callable[[float, int], Finding] = finding) -> list[Finding]:
    kept: dict[str, Any] = {}
    out = []
    for k, rate in enumerate(rates):
        out.append(follow(exam(k, kept), make(rate, k)))
        kept = json.loads(canonical_json(out[-1].memory))
    return out


def test_undecided_gates_add_up_to_a_failure_that_says_so() -> None:
    found = after([0.125] * 30)
    status = [f.status for f in found]
    first = status.index("fail")
    assert status[:first] == ["undecided"] * first and 2 <= first < 20
    assert "drift" in found[first].reason
    assert found[first].memory["detector"]["gates"] == 0  # it told what it knew
    assert found[first].memory["detector"]["alarms"] == [first]
    assert all(f.status == "undecided" for f in after([0.05] * 30))


def test_a_control_out_of_bounds_adds_nothing() -> None:
    found = after([0.125] * 30, lambda r, k: finding(r, k, control={"ok": False}))
    assert {f.status for f in found} == {"undecided"} and found[-1].memory["detector"]["gates"] == 0


def test_a_gate_that_measured_nothing_keeps_the_evidence() -> None:
    kept = after([0.125] * 3)[-1].memory
    bare = follow(exam(3, kept), Finding("not_applicable"))
    assert bare.status == "not_applicable"
    assert bare.memory["detector"]["value"] == kept["detector"]["value"]
    assert follow(exam(0, {}), Finding("not_applicable")).memory == {}


def test_after_a_rollback_the_abandoned_branch_does_not_count() -> None:
    kept = after([0.125] * 3)[-1].memory  # gates 0 to 2; gate 3 was rolled back
    assert follow(exam(4, kept), finding(0.125, 4)).memory["detector"]["gates"] == 1
    assert follow(exam(3, kept), finding(0.125, 3)).memory["detector"]["gates"] == 4
    assert follow(exam(4, kept, every=2), finding(0.125, 4)).memory["detector"]["gates"] == 4


def test_a_verdict_asked_for_again_counts_once() -> None:
    kept = after([0.125] * 3)[-1].memory
    assert follow(exam(2, kept), finding(0.125, 2)).memory["detector"]["value"] == kept["detector"]["value"]


def test_several_tests_of_one_gate_are_averaged() -> None:
    tests = [SequentialTest(0.25, "at_most", 0.01, 0.01).update(x) for x in ([1.0, 1.0], [0.0], [0.0, 1.0])]
    expected = np.mean([np.exp(t.stakes) for t in tests], axis=0)
    assert np.exp(together(tests)) == pytest.approx(expected)


def test_what_is_not_a_state_is_refused() -> None:
    good = run([[0.0]], "sum", [0.1]).state()
    for broken in (
        {},
        good | {"form": "mean"},
        good | {"log_wealth": [0.0]},
        good | {"best": "x"},
        good | {"gate": None},
    ):
        with pytest.raises(VerificationError, match="detector"):
            Detector.resume(broken)
    detector = run([[0.0], [1.0]], "sum", [0.01, 0.01])
    with pytest.raises(ValueError, match="taken already"):
        detector.take(1, stakes([0.0]), 0.01)
    with pytest.raises(ValueError, match="bets"):
        detector.take(2, np.zeros(len(PASS_BETS)), 0.01)
    with pytest.raises(ValueError, match="level"):
        detector.take(2, stakes([0.0]), 0.0)
