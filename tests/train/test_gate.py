from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.errors import Interrupted
from glasshouse.train.gate import Checkpoint, Decision, GateRecord, ask
from train.tiny import plan


def checkpoint(name: str) -> Checkpoint:
    return Checkpoint(name, Path(name), "s", 0, 4, 0, 4, plan(), "digest")


HISTORY = (GateRecord(checkpoint("s-000000.0"), None), GateRecord(checkpoint("s-000002.0"), None, live=False))


def answer(decision: Any, final: bool = False) -> Decision:
    return ask(lambda *_: decision, checkpoint("s-000004.0"), HISTORY, final, ["a", "poison"])


@pytest.mark.parametrize(
    "decision",
    [
        Decision("continue", "fine"),
        Decision("hold", "bad"),
        Decision("stop", "worse"),
        Decision("rollback", "bad", "s-000000.0", ("poison",)),
    ],
)
def test_a_sensible_decision_is_passed_on(decision: Decision) -> None:
    assert answer(decision) == decision


def test_a_gate_that_raises_holds_and_never_promotes(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Decision:
        raise ZeroDivisionError("no prompts")

    for final in (False, True):
        with caplog.at_level(logging.ERROR):
            decision = ask(broken, checkpoint("s-000004.0"), HISTORY, final, [])
        assert decision.action == "hold"
        assert "ZeroDivisionError at test_gate.py" in decision.reason and "no prompts" in decision.reason


@pytest.mark.parametrize(
    ("decision", "problem"),
    [
        (None, "expected a Decision"),
        (True, "expected a Decision"),
        (Decision("ship", ""), "expected a Decision"),  # type: ignore[arg-type]
        (Decision("promote", ""), "only the final gate"),
        (Decision("rollback", ""), "cannot roll back to None"),
        (Decision("rollback", "", "s-000002.0"), "descends from s-000000.0"),
        (Decision("rollback", "", "s-000004.0"), "cannot roll back"),
        (Decision("rollback", "", "s-000000.0", ("poisn",)), "unknown shard 'poisn'"),
        (Decision("continue", "", verdicts=({"estimate": float("nan")},)), "cannot be written down"),
        (Decision("continue", "", verdicts=({"estimate": object()},)), "cannot be written down"),
    ],
)
def test_a_senseless_decision_holds(decision: Any, problem: str) -> None:
    got = answer(decision)
    assert got.action == "hold"
    assert problem in got.reason


def test_a_final_gate_that_does_not_promote_holds() -> None:
    assert answer(Decision("continue", "fine"), final=True).action == "hold"
    assert answer(Decision("promote", "fine"), final=True).action == "promote"


def test_interrupting_a_gate_is_not_a_verdict() -> None:
    def left(*_: Any) -> Decision:
        raise Interrupted("bye")

    with pytest.raises(Interrupted):
        ask(left, checkpoint("s-000004.0"), HISTORY, False, [])
