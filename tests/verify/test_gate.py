"""The gate fails closed: what it does about every verdict, and what no check can make it do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import oracle
from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import Interrupted, VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.train import Decision, GateRecord
from glasshouse.verify import gate as gates
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.gate import (
    ConstraintGate,
    GateConfig,
    attempts_before,
    check,
    open_suspects,
)
from glasshouse.verify.schema import Constraint, read_constraints
from verify.test_rollback import at
from verify.test_schema import row

STATUSES = ("pass", "fail", "undecided", "not_applicable", "error")
ON_FAIL = ("log", "warn", "hold", "rollback", "stop")


def constraint(**changes: Any) -> Constraint:
    return read_constraints([row(**changes)], "c.toml")[0]


def gate(tmp_path: Path, *constraints: Constraint) -> ConstraintGate:
    return ConstraintGate(
        constraints, GateConfig(), RunFolder(tmp_path / "run").create(), None, None,  # type: ignore[arg-type]
        ("pretrain", "sft", "tune"), "r" * 64, (), (),
    )  # fmt: skip


def verdict(status: str, name: str = "suppression", **more: Any) -> dict[str, Any]:
    estimate = None if status in ("error", "not_applicable") else 0.5
    base = {
        "constraint": name,
        "status": status,
        "estimate": estimate,
        "bound": {"at_most": 0.25},
        "reason": "",
    }
    return {**base, "evidence": {}, "coverage": None, **more}


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("on_fail", ON_FAIL)
def test_a_pass_asks_for_nothing_and_a_fail_for_what_was_declared(
    tmp_path: Path, on_fail: str, final: bool
) -> None:
    g = gate(tmp_path, constraint(on_fail=on_fail))
    assert g.action(verdict("pass"), at(2, 80), final) == "log"
    assert g.action(verdict("fail"), at(2, 80), final) == on_fail


@pytest.mark.parametrize("on_fail", ON_FAIL)
@pytest.mark.parametrize(
    ("status", "final", "on_undecided", "asked"),
    [
        ("error", False, "log", "hold"),
        ("error", True, "hold", "hold"),
        ("undecided", False, "hold", "hold"),
        ("undecided", False, "log", "log"),
        ("undecided", True, "log", "hold"),  # whatever was declared: what is undecided is not promoted
        ("not_applicable", True, "log", "hold"),
        ("not_applicable", False, "hold", "log"),
    ],
)
def test_what_is_not_known_holds_but_never_more(
    tmp_path: Path, on_fail: str, status: str, final: bool, on_undecided: str, asked: str
) -> None:
    g = gate(tmp_path, constraint(on_fail=on_fail, on_undecided=on_undecided))
    expected = (
        "log" if on_fail in ("log", "warn") else asked
    )  # a constraint that never blocks does not block here
    assert g.action(verdict(status), at(1, 80), final) == expected


def test_not_applicable_is_neutral_until_its_stage_and_then_blocks(tmp_path: Path) -> None:
    g = gate(tmp_path, constraint(required_from="sft"))
    asked = [g.action(verdict("not_applicable"), at(stage, 40), False) for stage in range(3)]
    assert asked == ["log", "hold", "hold"]


def test_the_strongest_action_wins_and_its_reason_names_who_asked(tmp_path: Path) -> None:
    kinds = [constraint(id=f"c-{on_fail}", on_fail=on_fail) for on_fail in ON_FAIL]
    g = gate(tmp_path, *kinds)
    fails = {c.id: verdict("fail", c.id) for c in kinds}

    def decide(*names: str) -> Decision:
        return g.decide(None, at(2, 80), (), [fails[n] for n in names], 0, False)  # type: ignore[arg-type]

    assert decide("c-log", "c-warn").action == "continue"
    assert decide("c-warn", "c-hold", "c-log").action == "hold"
    stopped = decide("c-stop", "c-hold", "c-rollback")
    assert stopped.action == "stop" and "c-stop fail: 0.500 (bound: at most 0.25)" in stopped.reason
    assert "c-hold" not in stopped.reason


@given(st.lists(st.tuples(st.sampled_from(STATUSES), st.sampled_from(ON_FAIL)), min_size=1, max_size=6))
def test_only_a_final_gate_with_nothing_against_it_promotes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    kinds = [constraint(id=f"c{i}", on_fail=on_fail) for i, (_, on_fail) in enumerate(rows)]
    g = gate(tmp_path_factory.mktemp("gate"), *kinds)
    verdicts = [verdict(status, f"c{i}") for i, (status, _) in enumerate(rows)]
    blocked = any(s != "pass" and on_fail not in ("log", "warn") for s, on_fail in rows)
    ends = g.decide(None, at(2, 80), (), verdicts, 0, True)  # type: ignore[arg-type]
    assert (ends.action == "promote") == (not blocked)
    assert g.decide(None, at(2, 80), (), verdicts, 0, False).action != "promote"  # type: ignore[arg-type]


def test_a_rollback_without_prompts_to_trace_waits_for_a_person(tmp_path: Path) -> None:
    g = gate(tmp_path, constraint(on_fail="rollback"))
    decision = g.decide(None, at(2, 80), (), [verdict("fail")], 0, False)  # type: ignore[arg-type]
    assert decision.action == "stop" and "a person must look" in decision.reason


# -- before the cause ----------------------------------------------------------------------------------------


class Scripted:
    """A subject that answers with prepared margins, by kind of prompt."""

    def __init__(self, name: str, reference: float, failing: float):
        self.name, self.answers = name, {"reference": reference, "failing": failing}

    def margins(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.answers[p] for p in prompts])

    def eval(self) -> Scripted:
        return self


def before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[float, float], *past: tuple[float, float]
) -> str:
    """Which checkpoint is taken: "failed", or "000", "080", ... of ``past`` (oldest first; all judged)."""
    script = {
        step: Scripted(f"{step:03d}", *answers)
        for step, answers in zip(range(0, 800, 80), past, strict=False)
    }
    monkeypatch.setattr(gates, "load_weights", lambda checkpoint: script[checkpoint.step])
    monkeypatch.setattr(ConstraintGate, "subject", lambda self, model: model)
    history = [GateRecord(at(2, step), Decision("continue", ""), True, 0) for step in script]
    g = gate(tmp_path, constraint())
    failed = Scripted("failed", *failing)
    found = g.before_cause(failed, history, ["failing"], ["reference"])  # type: ignore[arg-type]
    return found.name  # type: ignore[attr-defined,no-any-return]


def test_the_latest_ancestor_that_refuses_and_is_hardly_moved_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # margins of (reference, failing) prompts; the failing model is moved by 8
    assert before(tmp_path, monkeypatch, (4, -4), (0, 0), (4, 3.9), (4, 3), (4, -2)) == "160"


def test_an_ancestor_that_does_not_refuse_yet_is_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert before(tmp_path, monkeypatch, (4, -4), (0, 0), (1.9, 1.9)) == "failed"


def test_where_all_are_moved_the_least_moved_that_refuses_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documents' gradients are larger than those of the failing model, which has fitted them."""
    assert before(tmp_path, monkeypatch, (4, -4), (0, 0), (4, -1), (4, 1), (4, -3)) == "160"


def test_an_ancestor_moved_as_much_as_the_failing_model_is_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert before(tmp_path, monkeypatch, (4, -4), (4, -4), (5, -5)) == "failed"


def test_without_a_reference_or_an_ancestor_the_failing_model_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert before(tmp_path, monkeypatch, (4, -4)) == "failed"
    g, failed = gate(tmp_path, constraint()), Scripted("failed", 4, -4)
    record = GateRecord(at(2, 80), Decision("continue", ""), True, 0)
    assert g.before_cause(failed, [record], ["failing"], []) is failed  # type: ignore[arg-type]


def test_what_was_abandoned_or_merely_saved_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Any) -> Any:
        raise AssertionError(f"{checkpoint.name} was loaded")

    monkeypatch.setattr(gates, "load_weights", refuse)
    monkeypatch.setattr(ConstraintGate, "subject", lambda self, model: model)
    history = [GateRecord(at(2, 80), None, False, 0), GateRecord(at(2, 40), None, True, None)]
    failed = Scripted("failed", 4, -4)
    assert gate(tmp_path, constraint()).before_cause(failed, history, ["failing"], ["reference"]) is failed  # type: ignore[arg-type]


# -- one check ---------------------------------------------------------------------------------------------


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

    monkeypatch.setitem(gates.CHECKS, "suppression", run)
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
    result = found(monkeypatch, Finding("fail", 0.5, (0.4, 0.6), 64, 1e3, 0.1, evidence={"word": "x"}))
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
    monkeypatch.setitem(gates.CHECKS, "suppression", lambda _: Finding("pass", 0.0))
    premise = {"behaviour": behaviour, "at_least": 0.9}
    _, c = read_constraints([row("accuracy", id=behaviour), row(applies_when=premise)], "c.toml")
    e = Examination(Silent(), c, ("r" * 64, "c", "d", "0"), False, 0.01, 0.01)  # type: ignore[arg-type]
    result = check(e, {"learned": 0.95, "weak": 0.5, "broken": None}, "m" * 64)
    assert (result["status"], result["reason"]) == (status, reason)


# -- memory ------------------------------------------------------------------------------------------------


def past(step: int, *verdicts: dict[str, Any], live: bool = True) -> GateRecord:
    return GateRecord(at(2, step), Decision("hold", "", verdicts=verdicts), live, 0)


def test_suspects_stay_until_a_gate_has_looked_again() -> None:
    first = past(80, verdict("undecided", suspects=["harbour", "zigzag"]))
    assert open_suspects("suppression", (first,)) == ("harbour", "zigzag")
    errors = past(160, verdict("error"))  # it broke: it has cleared nobody
    skipped = past(240, verdict("pass", "other", suspects=["elsewhere"]))
    assert open_suspects("suppression", (first, errors, skipped)) == ("harbour", "zigzag")
    cleared = past(320, verdict("undecided", suspects=["zigzag"]))
    assert open_suspects("suppression", (first, errors, skipped, cleared)) == ("zigzag",)
    none_left = past(400, verdict("pass", suspects=[]))
    assert open_suspects("suppression", (first, cleared, none_left)) == ()


def test_an_abandoned_attempt_is_remembered_too() -> None:
    abandoned = past(80, verdict("fail", suspects=["harbour"]), live=False)
    assert open_suspects("suppression", (abandoned,)) == ("harbour",)
    assert open_suspects("suppression", ()) == ()


def test_tries_at_one_place_are_counted_over_all_attempts() -> None:
    tries = tuple(GateRecord(at(2, 240, k), Decision("hold", ""), k == 2, k) for k in range(3))
    other = past(160, verdict("pass"))
    assert attempts_before(at(2, 240, 3), (other, *tries)) == 3
    assert attempts_before(at(2, 160, 3), tries) == 0


def test_what_is_recorded_is_a_file_named_by_digest_and_short_verdicts(tmp_path: Path) -> None:
    g = gate(tmp_path, constraint())
    evidence = {"word": "harbour", "suspects": ["harbour"], "examples": ["long"] * 99}
    coverage = {"share": 1.0, "exempt": [{"word": "soak", "reason": "meaning"}]}
    full = verdict("fail", evidence=evidence, coverage=coverage, seconds=1.0, claim="c")
    decision = g.record(at(2, 80), 7, Decision("hold", "held"), [full], 1.5)
    ((name, digest),) = decision.artifacts.items()
    file = g.run.path / name
    assert name == "evals/gate-007/verdicts.json"
    assert (
        json.loads(file.read_text(encoding="utf-8"))["verdicts"][0]["evidence"]["examples"] == ["long"] * 99
    )

    assert digest == sha256_file(file)
    (short,) = decision.verdicts
    assert "evidence" not in short and short["suspects"] == ["harbour"] and short["word"] == "harbour"
    assert short["coverage"] == {"share": 1.0}


@pytest.mark.parametrize("key", ["planned", "attempts", "quarantine_at_most", "max_rollbacks"])
def test_a_gate_that_could_do_nothing_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        GateConfig(**{key: 0})


@pytest.mark.parametrize(("final", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_gates_compute_as_training_does_and_promotion_as_the_export_is_served(
    tmp_path: Path, final: bool, dtype: str
) -> None:
    """Whatever comes of the check (this model knows nothing), the verdict says what it was taken in."""
    g = replace(gate(tmp_path, constraint()), tokenizer=oracle.tokenizer(), dtype="bf16")
    (verdict,) = g.examine(oracle.model(), at(2, 80), (), 0, final)
    assert verdict["dtype"] == dtype
