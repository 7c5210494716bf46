"""A verifier that training used cannot open the gate; one of another kind must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glasshouse.base.errors import RecipeError
from glasshouse.train import Decision
from glasshouse.verify.schema import Constraint, read_constraints
from glasshouse.verify.spent import spent_at, unopened
from verify.test_gate import gate, verdict
from verify.test_rollback import at
from verify.test_schema import row

STAGES = ("pretrain", "sft", "tune")
PROBE, BEHAVIOUR, SECOND = "probe-auroc", "compliance-rate", "probe-too"
BESIDE = ("update-outlier", "loss-ceiling", "extraction-rate", "preference-rate")  # none reads the decision


def constraints(*names: str) -> tuple[Constraint, ...]:
    rows = {
        PROBE: row("probe_auroc"),
        SECOND: row("probe_auroc", id=SECOND),
        BEHAVIOUR: row("compliance_rate"),
        **{name: row(name.replace("-", "_")) for name in BESIDE},
    }
    return read_constraints([rows[n] for n in names], "c.toml")


def test_what_a_stage_trained_against_stays_spent_in_later_ones() -> None:
    uses = {"sft": (PROBE,)}
    assert [spent_at(s, STAGES, uses) for s in STAGES] == [frozenset(), {PROBE}, {PROBE}]


@pytest.mark.parametrize(
    ("declared", "statuses", "opens"),
    [
        ((PROBE,), {}, False),  # nothing but the spent one
        ((PROBE, SECOND), {SECOND: "pass"}, False),  # of the same kind: it may be satisfied in the same way
        ((PROBE, BEHAVIOUR), {BEHAVIOUR: "pass"}, True),
        ((PROBE, BEHAVIOUR), {BEHAVIOUR: "not_applicable"}, False),
        *(((PROBE, name), {name: "pass"}, False) for name in BESIDE),  # of another kind, and of another thing
    ],
)
def test_the_gate_opens_only_to_a_held_out_verifier_of_another_kind(
    declared: tuple[str, ...], statuses: dict[str, str], opens: bool
) -> None:
    verdicts = [verdict("pass", PROBE, spent=True), *(verdict(s, n) for n, s in statuses.items())]
    reason = unopened(constraints(*declared), verdicts)
    assert (reason == "") == opens
    assert opens or "probe-auroc is spent" in reason


def test_promotion_is_held_with_the_reason_and_without_training_against_it_it_is_not(tmp_path: Path) -> None:
    g = gate(tmp_path, *constraints(PROBE, SECOND))

    def decide(**more: bool) -> Decision:
        rows = [verdict("pass", PROBE, **more), verdict("pass", SECOND)]
        return g.decide(None, at(2, 240), (), rows, 0, True)  # type: ignore[arg-type]

    assert decide().action == "promote"
    held = decide(spent=True)
    assert held.action == "hold" and "no held-out verifier of another kind" in held.reason


def test_a_spent_verifier_that_fails_still_blocks(tmp_path: Path) -> None:
    g = gate(tmp_path, *constraints(PROBE, BEHAVIOUR))
    rows = [verdict("fail", PROBE, spent=True), verdict("pass", BEHAVIOUR)]
    assert g.decide(None, at(2, 240), (), rows, 0, True).action == "hold"  # type: ignore[arg-type]


def test_using_a_constraint_that_is_not_declared_is_an_error(tmp_path: Path) -> None:
    g = gate(tmp_path, *constraints(PROBE))
    with pytest.raises(RecipeError, match="Did you mean 'probe-auroc'"):
        replace(g, uses={"sft": ("probe-aurok",)})
