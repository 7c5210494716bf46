"""The fold is checked against a model of the loop: whatever gates decide, and wherever a run is cut off."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glasshouse.base.errors import LedgerError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.train.fold import Position, position

STEPS, STAGES, EVERY = 6, 2, 3
SHARDS = ("a", "b", "c", "keep")
PLAN = DataPlan(phases=(Phase(from_step=0, weights=dict.fromkeys(SHARDS, 1.0)),))


def checkpoint(
    at: Position, index: int, step: int, update: int, gate: bool, why: str = "gate"
) -> dict[str, Any]:
    body = {
        "checkpoint": f"s{index}-{step:06d}.{at.attempt}",
        "stage": f"s{index}",
        "stage_index": index,
        "step": step,
        "attempt": at.attempt,
        "update": update,
        "parent": at.head,
        "why": why,
        "gate": at.gates if gate else None,
        "last": index == STAGES - 1 and step == STEPS,
        "metrics_bytes": update,
        "elapsed_s": 0.0,
    }
    return {"kind": "checkpoint", "body": body}


def decision(
    at: Position, action: str, to: str | None = None, drop: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    body = {
        "checkpoint": at.head,
        "gate": at.gates,
        "action": action,
        "asked": action,
        "to_checkpoint": to,
        "drop_shards": list(drop),
        "reason": "because",
        "metrics_bytes": at.metrics_bytes,
        "elapsed_s": 0.0,
    }
    return {"kind": "decision", "body": body | more}


class Runs(RuleBasedStateMachine):
    """Drives a run by appending what the loop would append; ``self.at`` is always folded from the start."""

    @initialize()
    def begin(self) -> None:
        self.entries: list[dict[str, Any]] = [{"kind": "run", "body": {}}]
        self.updates = self.stops = 0
        self.dropped: set[str] = set()
        self.append(checkpoint(self.at, 0, 0, 0, gate=False, why="start"))

    @property
    def at(self) -> Position:
        return position(self.entries)

    def append(self, entry: dict[str, Any]) -> None:
        before = self.at
        self.entries.append({"seq": len(self.entries), **entry})
        assert self.at.attempt >= before.attempt and self.at.update >= before.update

    @precondition(lambda self: self.at.phase == "train")
    @rule(interrupted_after=st.integers(0, EVERY))
    def train(self, interrupted_after: int) -> None:
        at = self.at
        index, step = at.at_head.stage_index, at.at_head.step
        if step == STEPS:
            index, step = index + 1, 0
        until = step - step % EVERY + EVERY
        reached = until if interrupted_after == 0 else min(until, step + interrupted_after)
        self.updates += reached - step
        self.append(checkpoint(at, index, reached, self.updates, gate=reached == until))

    @precondition(lambda self: self.at.phase == "gate")
    @rule(promote=st.booleans(), action=st.sampled_from(["continue", "hold"]))
    def pass_or_hold(self, promote: bool, action: str) -> None:
        at = self.at
        self.append(decision(at, "promote" if promote and at.at_head.last else action))

    @precondition(lambda self: self.at.phase == "gate" and self.at.rollbacks < 4)
    @rule(data=st.data(), drop=st.sets(st.sampled_from(SHARDS[:-1])), refused=st.booleans())
    def roll_back(self, data: st.DataObject, drop: set[str], refused: bool) -> None:
        at = self.at
        to = data.draw(st.sampled_from(at.lineage()[:-1]))
        if refused:  # one rollback too many: the loop stops, a person lets it happen
            self.append(decision(at, "stop", to, tuple(drop), asked="rollback"))
            self.append({"kind": "stop", "body": {"checkpoint": at.head, "reason": "too many"}})
            assert self.at.phase == "stopped"
            self.append({"kind": "resume", "body": {"after_stop": True}})
            assert self.at.rollbacks == 0
        else:
            self.append(decision(at, "rollback", to, tuple(drop)))
        self.dropped |= drop
        assert self.at.head == to and self.at.attempt == at.attempt + 1 and self.at.phase == "train"

    @precondition(lambda self: self.at.phase == "decided")
    @rule()
    def finish(self) -> None:
        at = self.at
        self.append({"kind": "finish", "body": {"checkpoint": at.head, "promoted": at.promoted}})
        assert self.at.phase == "finished"

    @rule()
    def something_else_is_written_down(self) -> None:
        self.append({"kind": "verdict", "body": {}})

    @invariant()
    def quarantine_holds_from_the_head_on(self) -> None:
        at = self.at
        for index in range(at.at_head.stage_index, STAGES):
            plan = at.plan_for(index, PLAN)
            step = at.at_head.step if index == at.at_head.stage_index else 0
            assert not set(plan.at(step).active) & self.dropped
            assert "keep" in plan.at(step).active

    @invariant()
    def names_are_unique_and_the_head_descends_from_the_beginning(self) -> None:
        at = self.at
        made = [e["body"]["checkpoint"] for e in self.entries if e["kind"] == "checkpoint"]
        assert len(set(made)) == len(made) == len(at.marks)
        assert at.lineage()[0] == "s0-000000.0" and at.lineage()[-1] == at.head
        assert at.update == self.updates

    @invariant()
    def only_a_final_gate_promotes(self) -> None:
        if self.at.promoted:
            assert self.at.at_head.last


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=25)


def begun(*more: dict[str, Any]) -> list[dict[str, Any]]:
    entries = [checkpoint(Position(), 0, 0, 0, gate=False)]
    entries.append(checkpoint(position(entries), 0, 3, 3, gate=True))
    return [*entries, *more]


def test_every_prefix_of_a_ledger_says_what_to_do_next() -> None:
    entries = begun()
    entries.append(decision(position(entries), "rollback", "s0-000000.0", ("a",)))
    entries.append(checkpoint(position(entries), 0, 3, 6, gate=True))
    entries.append(decision(position(entries), "stop"))
    phases = [position(entries[:n]).phase for n in range(len(entries) + 1)]
    assert phases == ["new", "train", "gate", "train", "gate", "stopped"]


def test_a_quarantine_reaches_back_when_a_later_rollback_goes_further() -> None:
    at = position(begun())
    drop_late = at.after_rollback("s0-000003.0", ["b"]).plan_for(0, PLAN)
    assert drop_late.first_step("b") == 0 and "b" not in drop_late.at(3).active
    twice = at.after_rollback("s0-000003.0", ["b"]).after_rollback("s0-000000.0", ["c"])
    assert twice.plan_for(0, PLAN).at(0).active == ("a", "keep")


def test_a_repair_holds_from_its_rollback_on_wherever_a_later_one_goes() -> None:
    """Also where a person lets the rollback happen that the loop refused; one that drops data has done so."""
    repair = {"kind": "route", "shards": ["a"]}
    entries = begun()
    entries.append(decision(position(entries), "rollback", "s0-000000.0", repair=repair))
    assert position(entries).repairs == (repair,)
    entries.append(checkpoint(position(entries), 0, 3, 6, gate=True))
    other = {"kind": "steer", "scale": 2.0}
    stop = decision(position(entries), "stop", "s0-000000.0", asked="rollback", repair=other)
    entries += [stop, {"kind": "stop", "body": {"checkpoint": "s0-000003.1", "reason": "too many"}}]
    assert position(entries).repairs == (repair,)
    entries.append({"kind": "resume", "body": {"after_stop": True}})
    assert position(entries).repairs == (repair, other)
    at = position(begun())
    assert at.after_rollback("s0-000000.0", ["a"], {"kind": "drop", "shards": ["a"]}).repairs == ()


@pytest.mark.parametrize(
    ("every", "times", "due"),
    [
        (10, 1, [10, 20, 30]),
        (10, 2, [5, 10, 15, 20]),
        (10, 3, [3, 6, 10, 13, 16, 20]),
        (2, 5, [1, 2, 3, 4]),
        (1, 4, [1, 2, 3]),
    ],
)
def test_a_dense_stage_keeps_the_recipes_gates_and_has_more_between(
    every: int, times: int, due: list[int]
) -> None:
    at, step, found = Position(dense={0: times}), 0, []
    for _ in due:
        step = at.next_gate(0, every, step)
        found.append(step)
    assert found == due
    assert at.next_gate(1, every, 0) == every  # another stage


def test_gates_stay_dense_for_the_stage_and_for_that_gone_back_to() -> None:
    entries = begun()
    entries.append(decision(position(entries), "continue", densify=4))
    entries.append(checkpoint(position(entries), 0, 6, 6, gate=True))
    entries.append(decision(position(entries), "hold"))
    assert position(entries).dense == {0: 4}
    entries.append(checkpoint(position(entries), 1, 3, 9, gate=True))
    entries.append(decision(position(entries), "rollback", "s0-000003.0", densify=2))
    assert position(entries).dense == {0: 4, 1: 2}  # never less often than a gate asked for


def test_other_entries_do_not_matter() -> None:
    noise = {"kind": "verdict", "body": {"checkpoint": "x"}}
    assert position([noise, *begun(), noise]) == position(begun())


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (decision(position(begun()), "rollback", "s0-000009.0"), "does not descend"),
        (decision(position(begun()), "rollback", "s0-000003.0"), "does not descend"),
        (decision(position(begun()), "promote"), "misplaced action 'promote'"),
        (decision(position(begun()), "continue", gate=7), "no gate was asked"),
        (checkpoint(position(begun()), 0, 6, 6, gate=True), "phase is 'gate'"),
        ({"kind": "finish", "body": {"checkpoint": "s0-000003.0", "promoted": True}}, "cannot finish"),
        ({"kind": "resume", "body": {"after_stop": True}}, "had not stopped"),
        ({"kind": "decision", "body": {"checkpoint": "s0-000003.0"}}, "lacks 'gate'"),
    ],
)
def test_a_ledger_that_contradicts_itself_is_refused(entry: dict[str, Any], problem: str) -> None:
    with pytest.raises(LedgerError, match=problem):
        position(begun({"seq": 2, **entry}))


def test_a_checkpoint_made_twice_is_refused() -> None:
    entries = begun()
    entries.append(decision(position(entries), "continue"))
    again = checkpoint(position(entries), 0, 3, 3, gate=True)
    with pytest.raises(LedgerError, match="there already"):
        position([*entries, again])
