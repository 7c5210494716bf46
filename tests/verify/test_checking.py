"""One check fails closed: whatever breaks, takes too long or rests on nothing is the verdict error."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest

from glasshouse.base.canonical import canonical_json
from glasshouse.base.errors import Interrupted, VerificationError
from glasshouse.verify.checking import CHECKS, check, with_premises
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.schema import read_constraints
from verify.test_gate import OK, constraint
from verify.test_schema import row


class Silent:
    """A subject that is never asked: the check under test does not get that far."""

    passes, strays, measured_in = 0, (), "float32"


def exam(**changes: Any) -> Examination:
    return Examination(Silent(), constraint(**changes), ("r" * 64, "c", "d", "0"), False, 0.01, 0.01)  # type: ignore[arg-type]


def found(monkeypatch: pytest.MonkeyPatch, result: Any, **changes: Any) -> dict[str, Any]:
    """The verdict of a check that returns or raises ``result``."""

    def run(_: Examination) -> Finding:
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]

    monkeypatch.setitem(CHECKS, "suppression", run)
    return check(exam(**changes), {"learned": 0.95, "weak": 0.5, "broken": None}, "m" * 64)


@pytest.mark.parametrize(
    "problem",
    [VerificationError("too few"), ValueError("odd"), KeyError("k"), ZeroDivisionError(), MemoryError()],
)
def test_an_exception_in_a_check_is_the_verdict_error(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    result = found(monkeypatch, problem)
    assert result["status"] == "error" and str(problem) in result["reason"]
    assert result["estimate"] is None
    canonical_json(result)


def test_ctrl_c_in_a_check_is_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (Interrupted("ctrl-c"), KeyboardInterrupt()):
        with pytest.raises(type(asked)):
            found(monkeypatch, asked)


def test_an_estimate_that_is_nan_is_an_error_even_when_the_check_says_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = found(monkeypatch, Finding("pass", math.nan, n=3))
    assert (result["status"], result["estimate"]) == ("error", None)
    canonical_json(result)


def test_a_verdict_carries_what_it_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    c = constraint()
    finding = Finding("fail", 0.5, (0.4, 0.6), 64, 1e3, 0.1, control=OK, evidence={"word": "x"})
    result = found(monkeypatch, finding)
    assert result["digests"]["model"] == "m" * 64 and result["digests"]["constraint"] == c.digest()
    assert (result["bound"], result["alpha"], result["dtype"]) == ({"at_most": 0.25}, 0.01, "float32")
    assert (result["interval"], result["n"], result["e_fail"], result["e_pass"]) == ([0.4, 0.6], 64, 1e3, 0.1)


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("learned", "pass", ""),
        ("weak", "not_applicable", "weak is 0.50, below 0.90"),
        ("broken", "not_applicable", "broken was not measured"),  # it was an error: nothing may be concluded
        ("elsewhere", "not_applicable", "elsewhere was not measured"),
    ],
)
def test_a_check_applies_only_where_its_premise_was_measured_and_holds(
    monkeypatch: pytest.MonkeyPatch, behaviour: str, status: str, reason: str
) -> None:
    monkeypatch.setitem(CHECKS, "suppression", lambda _: Finding("pass", 0.0, control=OK))
    premise = {"behaviour": behaviour, "at_least": 0.9}
    _, c = read_constraints([row("accuracy", id=behaviour), row(applies_when=premise)], "c.toml")
    e = Examination(Silent(), c, ("r" * 64, "c", "d", "0"), False, 0.01, 0.01)  # type: ignore[arg-type]
    result = check(e, {"learned": 0.95, "weak": 0.5, "broken": None}, "m" * 64)
    assert (result["status"], result["reason"]) == (status, reason)


# -- failing closed ------------------------------------------------------------------------------------------


def dawdle(_: Examination) -> Finding:
    """A check that swallows every exception it can, as a careless one might, and passes at last."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            time.sleep(0.01)
        except Exception:
            continue
    return Finding("pass", 0.0, control=OK)


def test_a_check_that_takes_too_long_is_stopped_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "suppression", dawdle)
    started = time.monotonic()
    result = check(exam(timeout_s=0.2), {}, "m" * 64)
    assert time.monotonic() - started < 5
    assert (result["status"], result["estimate"]) == ("error", None)
    assert result["reason"].startswith("not finished within timeout_s = 0.2")


def test_outside_the_main_thread_a_late_pass_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(_: Examination) -> Finding:
        time.sleep(0.3)
        return Finding("pass", 0.0, control=OK)

    monkeypatch.setitem(CHECKS, "suppression", late)
    results: list[dict[str, Any]] = []
    worker = threading.Thread(target=lambda: results.append(check(exam(timeout_s=0.1), {}, "m" * 64)))
    worker.start()
    worker.join()
    assert results[0]["status"] == "error"


def test_a_check_within_its_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "suppression", lambda _: Finding("pass", 0.0, control=OK))
    assert check(exam(timeout_s=30.0), {}, "m" * 64)["status"] == "pass"
    time.sleep(0.01)
    assert check(exam(), {}, "m" * 64)["status"] == "pass"


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (Finding("pass"), "without an estimate"),
        (Finding("fail"), "without an estimate"),
        (Finding("pass", math.inf), "estimate is inf"),
        (Finding("pass", 0.0), "pass without its control (random-word)"),
        (Finding("fail", 0.9), "fail without its control (random-word)"),
        (Finding("pass", 0.0, (0.0, math.nan), control=OK), "cannot be written down"),
        (Finding("pass", 0.0, e_pass=math.inf, control=OK), "cannot be written down"),
        (Finding("pass", 0.0, control=OK, evidence={"value": math.nan}), "cannot be written down"),
        (Finding("pass", 0.0, control=OK, evidence={"value": {1, 2}}), "cannot be written down"),
        (Finding("pass", 0.0, control=OK, memory={"model": object()}), "cannot be written down"),
        (Finding("pass", 0.0, control=OK, coverage={"share": math.nan}), "cannot be written down"),
    ],
)
def test_a_decision_without_evidence_that_can_stand_is_an_error(
    monkeypatch: pytest.MonkeyPatch, finding: Finding, said: str
) -> None:
    result = found(monkeypatch, finding)
    assert result["status"] == "error" and said in result["reason"]
    canonical_json(result)


def test_premises_of_premises_are_found() -> None:
    rows = [
        row("accuracy", id="a"),
        row("compliance_rate", id="b", applies_when={"behaviour": "a", "at_least": 0.5}),
        row(id="c", applies_when={"behaviour": "b", "at_least": 0.5}),
        row("refusal_rate", id="d"),
    ]
    a, b, c, d = read_constraints(rows, "c.toml")
    assert with_premises([c], [a, b, c, d]) == [a, b, c]
    assert with_premises([d], [a, b, c, d]) == [d]
