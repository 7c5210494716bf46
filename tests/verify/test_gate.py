"""The gate fails closed: what it does about every verdict, and what no check can make it do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import oracle
from glasshouse.base.run import RunFolder
from glasshouse.train import Decision
from glasshouse.verify.gate import (
    ConstraintGate,
    GateConfig,
)
from glasshouse.verify.schema import Constraint, read_constraints
from verify.test_rollback import at
from verify.test_schema import row

STATUSES = ("pass", "fail", "undecided", "not_applicable", "error")
ON_FAIL = ("log", "warn", "hold", "rollback", "stop")
OK = {"subject": "any", "ok": True}  # a control that was taken, of a check that decides


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
