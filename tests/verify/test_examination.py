"""What a check is given, how its control is applied, and how error levels are shared out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError
from glasshouse.verify.examination import (
    Examination,
    Finding,
    control_row,
    detection_floor,
    error_share,
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
    asked: list[tuple[int, int]] = []

    def clean(start: int, n: int) -> list[float]:
        asked.append((start, n))
        return [0.0] * n

    test = sequentially(SequentialTest(0.1, "at_most", 0.01, 0.01), clean, 1000)
    assert test.state == "pass" and asked == [(0, 64), (64, 64)]
    asked.clear()
    test = sequentially(SequentialTest(0.1, "at_most", 0.01, 1e-30), clean, 100)
    assert test.state == "undecided" and asked == [(0, 64), (64, 36)] and test.n == 100


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
