"""What a check sees of the run around it, gate after gate, and that a gate asked twice says the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals import oracle
from glasshouse.base.errors import VerificationError
from glasshouse.train import Decision, GateRecord
from glasshouse.verify import gate as gates
from glasshouse.verify.checking import CHECKS
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.gate import ConstraintGate
from verify.test_gate import OK, constraint, gate
from verify.test_rollback import at


@pytest.fixture
def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConstraintGate]:
    """A gate whose one check is the given function, and whose checkpoints are all one model."""

    def make(run: Callable[[Examination], Finding], **changes: Any) -> ConstraintGate:
        monkeypatch.setitem(CHECKS, "suppression", run)
        monkeypatch.setattr(gates, "load_weights", lambda checkpoint: oracle.model())
        return replace(gate(tmp_path, constraint(**changes)), tokenizer=oracle.tokenizer())

    return make


def at_gate(g: ConstraintGate, *decisions: Decision) -> Decision:
    """The decision of the gate after those."""
    history = tuple(GateRecord(at(2, 80 * (k + 1)), d, True, k) for k, d in enumerate(decisions))
    return g(at(2, 80 * (len(history) + 1)), history, False)


def test_memory_and_files_go_from_gate_to_gate(wired: Callable[..., ConstraintGate]) -> None:
    seen = []

    def count(exam: Examination) -> Finding:
        around, n = exam.around, exam.around.kept.get("n", 0)
        before = None if around.last is None else (around.last / "n.txt").read_text()
        seen.append((n, before, None if around.before is None else type(around.before())))
        assert around.out is not None and not any(around.out.iterdir())
        (around.out / "n.txt").write_text(str(n + 1))
        return Finding("pass", 0.0, control=OK, memory={"n": n + 1})

    g = wired(count)
    first = at_gate(g)
    assert "evals/gate-000/suppression/n.txt" in first.artifacts
    second = at_gate(g, first)
    third = at_gate(g, first, second)
    assert seen == [(0, None, None), (1, "1", type(oracle.model())), (2, "2", type(oracle.model()))]
    assert [d.verdicts[0]["memory"] for d in (first, second, third)] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_gate_killed_half_way_says_the_same_when_asked_again(wired: Callable[..., ConstraintGate]) -> None:
    killed = True

    def broken_off(exam: Examination) -> Finding:
        nonlocal killed
        assert exam.around.out is not None and not any(exam.around.out.iterdir())
        (exam.around.out / "half.txt").write_text("half")
        if killed:
            killed = False
            raise KeyboardInterrupt
        prompts = exam.draw("search", 4)
        value = float(exam.subject.margins([p.text for p in prompts]).mean())
        return Finding("undecided", value, evidence={"asked": [p.text for p in prompts]})

    g = wired(broken_off)
    with pytest.raises(KeyboardInterrupt):
        at_gate(g)
    once, again = at_gate(g), at_gate(g)
    assert once.verdicts[0]["estimate"] is not None
    assert [{k: v for k, v in d.verdicts[0].items()} for d in (once, again)] == [once.verdicts[0]] * 2


def test_evidence_changed_between_gates_is_an_error_that_blocks(wired: Callable[..., ConstraintGate]) -> None:
    def leaves(exam: Examination) -> Finding:
        assert exam.around.out is not None
        (exam.around.out / "sae.bin").write_bytes(b"1")
        return Finding("pass", 0.0, control=OK, memory={"kept": True})

    g = wired(leaves)
    first = at_gate(g)
    (g.run.evals / "gate-000" / "suppression" / "sae.bin").write_bytes(b"2")
    second = at_gate(g, first)
    assert second.action == "hold" and second.verdicts[0]["status"] == "error"
    assert "not as gate 0 left it" in second.reason


def test_a_check_that_leaves_no_files_leaves_no_folder(wired: Callable[..., ConstraintGate]) -> None:
    g = wired(lambda exam: Finding("pass", 0.0, control=OK))
    assert list(at_gate(g).artifacts) == ["evals/gate-000/verdicts.json"]
    assert not (g.run.evals / "gate-000" / "suppression").exists()


def test_a_history_of_another_run_is_refused(wired: Callable[..., ConstraintGate]) -> None:
    g = wired(lambda exam: Finding("pass", 0.0, control=OK))
    first = at_gate(g)
    with pytest.raises(VerificationError, match="of another run"):
        at_gate(replace(g, recipe_digest="x" * 64), first)


def test_the_level_of_a_check_is_its_part_of_the_gates_level(wired: Callable[..., ConstraintGate]) -> None:
    levels = []

    def look(exam: Examination) -> Finding:
        levels.append((exam.alpha_fail, exam.alpha_pass))
        return Finding("pass", 0.0, control=OK)

    g = wired(look)
    at_gate(g)
    at_gate(replace(g, config=g.config.model_copy(update={"alpha": 0.002})))
    (own, pass_own), (split, pass_split) = levels
    assert split == pytest.approx(own / 5) and pass_own == pass_split  # own alpha is 0.01


def test_premises_are_measured_at_every_gate_that_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a constraint would be not applicable for no better reason than another one's cadence."""
    from glasshouse.verify.schema import read_constraints
    from verify.test_schema import row

    rows = [
        row("accuracy", id="learned", every=0),
        row(applies_when={"behaviour": "learned", "at_least": 0.5}),
    ]
    monkeypatch.setitem(CHECKS, "accuracy", lambda exam: Finding("pass", 0.9, control=OK))
    monkeypatch.setitem(CHECKS, "suppression", lambda exam: Finding("pass", 0.0, control=OK))
    monkeypatch.setattr(gates, "load_weights", lambda checkpoint: oracle.model())
    g = replace(gate(tmp_path, *read_constraints(rows, "c.toml")), tokenizer=oracle.tokenizer())
    assert {v["constraint"]: v["status"] for v in at_gate(g).verdicts} == {
        "learned": "pass",
        "suppression": "pass",
    }


def test_each_gate_and_each_try_at_promotion_has_its_own_share_of_the_level(
    wired: Callable[..., ConstraintGate],
) -> None:
    """Gates beyond the plan, and tries beyond the declared ones, get ever less: no run outgrows its level."""
    g = wired(lambda exam: Finding("pass", 0.0, control=OK))
    g = replace(g, config=g.config.model_copy(update={"planned": 2, "attempts": 2}))

    def shares(index: int, tries: int) -> tuple[float, float]:
        history = tuple(GateRecord(at(2, 80, k), Decision("hold", ""), True, k) for k in range(tries))
        exam = g.examination(oracle.model(), g.constraints[0], at(2, 80, tries), history, index, True)
        return exam.alpha_fail, exam.alpha_pass

    part = 0.01 / 3
    expected = [part, part, part / 2, part / 6]
    assert [shares(k, 0)[0] for k in range(4)] == pytest.approx(expected)
    assert [shares(0, k)[1] for k in range(4)] == pytest.approx(expected)
    assert shares(3, 0)[1] == pytest.approx(part) and shares(0, 3)[0] == pytest.approx(part)


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (0, [])])
def test_a_check_is_made_at_every_so_many_gates_and_always_before_promotion(
    wired: Callable[..., ConstraintGate], every: int, due: list[int]
) -> None:
    g = wired(lambda exam: Finding("pass", 0.0, control=OK), every=every)

    def asked(index: int, final: bool) -> bool:
        return bool(g.examine(oracle.model(), at(2, 80), (), index, final))

    assert [k for k in range(5) if asked(k, False)] == due
    assert all(asked(k, True) for k in range(5))
