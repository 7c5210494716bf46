"""What a check is given, how its control is applied, and how error levels are shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import oracle
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError
from glasshouse.verify.between import BetweenTest
from glasshouse.verify.examination import (
    Examination,
    Finding,
    control_row,
    detection_floor,
    error_share,
    fewest,
    from_test,
    sequentially,
    settle,
)
from glasshouse.verify.schema import read_constraints
from glasshouse.verify.sequential import SequentialTest
from verify.test_schema import row


class Nobody:
    strays = ("harbour",)


def exam(data: dict[str, Any] | None = None, **changes: Any) -> Examination:
    (constraint,) = read_constraints([data or row()], "c.toml")
    given: dict[str, Any] = {"seed": ("recipe", "constraint", "digest", "0"), "final": False}
    return Examination(Nobody(), constraint, **{**given, "alpha_fail": 0.01, "alpha_pass": 0.02, **changes})  # type: ignore[arg-type]


def test_prompts_are_fresh_at_every_gate_and_the_same_on_resume() -> None:
    first, again, later = exam(), exam(), exam(seed=("recipe", "constraint", "digest", "1"))
    assert first.draw("search", 30) == again.draw("search", 30)
    assert first.draw("search", 30) != later.draw("search", 30)


def test_search_and_confirmation_do_not_share_their_prompts() -> None:
    search, confirm = (exam().draw(purpose, 100) for purpose in ("search", "confirm"))
    assert [p.text for p in search] != [p.text for p in confirm]
    assert len({p.text for p in search} & {p.text for p in confirm}) < 10  # by chance, in a small language


def test_prompt_files_are_found_beside_the_constraints_and_checked(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "harmful": true}\n', encoding="utf-8")
    spec = {"path": "p.jsonl", "sha256": sha256_file(tmp_path / "p.jsonl")}
    assert exam(row(prompts=spec), folder=tmp_path).draw("search", 1)[0].text == "x"
    with pytest.raises(DataError, match="the constraint declares"):
        exam(row(prompts=spec | {"sha256": "0" * 64}), folder=tmp_path).draw("search", 1)


def test_several_tests_split_the_level_of_a_wrong_fail() -> None:
    assert exam().test().alpha_fail == 0.01
    assert exam().test(5).alpha_fail == pytest.approx(0.002)
    assert exam().test(5).alpha_pass == 0.02  # all of them must pass: no split
    assert exam().test(0).alpha_fail == 0.01


@pytest.mark.parametrize("status", ["pass", "fail"])
def test_a_control_out_of_bounds_leaves_nothing_decided(status: str) -> None:
    finding = Finding(status, 0.1, control=control_row(exam(), 0.5, 64), reason="so it was")  # type: ignore[arg-type]
    settled = settle(finding)
    assert settled.status == "undecided"
    assert "random-word" in settled.reason and "0.500" in settled.reason and "so it was" in settled.reason


@pytest.mark.parametrize("status", ["error", "not_applicable", "undecided"])
def test_a_control_never_improves_a_verdict(status: str) -> None:
    finding = Finding(status, control=control_row(exam(), 0.5, 64))  # type: ignore[arg-type]
    assert settle(finding).status == status


def test_a_control_within_bounds_or_none_changes_nothing() -> None:
    for control in (control_row(exam(), 0.2, 64), None):
        assert settle(Finding("pass", control=control)).status == "pass"
    assert control_row(exam(), math.nan, 64)["ok"] is False  # type: ignore[index]


def test_outcomes_are_fed_until_a_decision_or_the_end() -> None:
    """The first look is where the best of streams passes, the next are 32 outcomes apart."""
    asked: list[tuple[int, int]] = []

    def outcomes(start: int, n: int, bad: int = 0) -> list[float]:
        asked.append((start, n))
        return [float(start + i < bad) for i in range(n)]

    bound = SequentialTest(0.1, "at_most", 0.01, 0.01)
    soonest = fewest(bound)
    one_less = SequentialTest(0.1, "at_most", 0.01, 0.01).update([0.0] * (soonest - 1))
    assert one_less.state == "undecided" and one_less.update([0.0]).state == "pass"
    assert sequentially(bound, outcomes, 1000).state == "pass" and asked == [(0, soonest)]
    asked.clear()
    test = SequentialTest(0.1, "at_most", 0.01, 0.01)
    assert sequentially(test, lambda start, n: outcomes(start, n, bad=1), 1000).state == "pass"
    assert asked == [(0, soonest), (soonest, 32)]
    asked.clear()
    test = sequentially(SequentialTest(0.1, "at_most", 0.01, 1e-30), outcomes, 200)
    assert test.state == "undecided" and asked == [(0, 128), (128, 32), (160, 32), (192, 8)] and test.n == 200


def test_a_test_between_two_limits_looks_first_where_its_middle_passes() -> None:
    soonest = fewest(BetweenTest(0.9, "at_most", 0.01, 0.01, low=0.1))
    assert BetweenTest(0.9, "at_most", 0.01, 0.01, low=0.1).update([0.5] * soonest).state == "pass"
    assert BetweenTest(0.9, "at_most", 0.01, 0.01, low=0.1).update([0.5] * (soonest - 1)).state != "pass"


def test_refused_prompts_are_asked_only_as_they_are_needed() -> None:
    rule = lambda text: -1.0 if "scroll" in text else 1.0  # noqa: E731
    e = exam(row("ablation_effect"))
    oracle_exam = replace(e, subject=oracle.Oracle(rule))
    stream = oracle_exam.refused("confirm", 400)
    first = stream.first(20)
    assert len(first) == 20 and 0 < oracle_exam.subject.passes <= 64
    assert all("scroll" not in p.text for p in first)
    assert stream.first(50)[:20] == first
    everything = stream.first(400)
    kept = [p for p in oracle_exam.draw("confirm", 800) if p.harmful and "scroll" not in p.text][:400]
    assert everything == kept


def test_what_is_fitted_to_is_shared_by_the_constraints_of_a_gate_and_tests_are_not() -> None:
    one = exam(row("probe_auroc"), seed=("recipe", "one", "digest", "0"))
    two = exam(row("ablation_effect"), seed=("recipe", "two", "digest", "0"))
    one, two = (replace(e, seed=("recipe", e.constraint.digest(), "digest", "0")) for e in (one, two))
    assert one.fitting(40)[:20] == two.fitting(20)
    assert one.draw("confirm", 20) != two.draw("confirm", 20)
    later = replace(one, seed=("recipe", one.constraint.digest(), "digest", "1"))
    assert later.fitting(40) != one.fitting(40)


def test_no_outcome_at_all_is_a_nan_and_not_an_estimate() -> None:
    test = sequentially(SequentialTest(0.1, "at_most", 0.01, 0.01), lambda start, n: [], 100)
    finding = from_test(test)
    assert finding.status == "undecided" and math.isnan(finding.estimate or 0.0)


@given(st.floats(1e-6, 0.49), st.integers(1, 60))
def test_all_looks_together_never_exceed_the_error_level(alpha: float, planned: int) -> None:
    shares = [error_share(alpha, k, planned) for k in range(planned + 400)]
    assert sum(shares) <= alpha * (1 + 1e-9)
    assert sum(shares) > 0.99 * alpha or planned < 3  # and next to nothing of it is wasted
    assert all(s > 0 for s in shares)
    assert len(set(shares[:planned])) == 1 and shares[planned] < shares[planned - 1]


@given(st.floats(0.001, 0.5), st.integers(1, 200))
def test_the_detection_floor_is_what_is_missed_with_probability_alpha(alpha: float, cells: int) -> None:
    floor = detection_floor(alpha, cells)
    assert 0 < floor < 1
    assert (1 - floor) ** cells == pytest.approx(alpha)
    assert detection_floor(alpha, cells + 1) < floor
