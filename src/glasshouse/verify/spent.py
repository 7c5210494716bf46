"""A verifier that training used is spent: it may still fail, but its pass no longer opens the gate.

A model trained against a read-out learns to satisfy the read-out, which need not be the claim. What opens the
gate then is a verifier of another kind that no loss has seen, on the same subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.verify.schema import REGISTRY, Constraint


def spent_at(stage: str, stages: Sequence[str], uses: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Constraints that this stage or an earlier one has trained against: what was learned stays."""
    until = stages[: stages.index(stage) + 1]
    return frozenset(name for s in until for name in uses.get(s, ()))


def unopened(constraints: Sequence[Constraint], verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Why spent verifiers keep the gate shut; empty when for each a held-out one of another kind passes."""
    by_id = {c.id: c for c in constraints}
    passed = {v["constraint"] for v in verdicts if v["status"] == "pass" and not v.get("spent")}
    for name in (v["constraint"] for v in verdicts if v.get("spent")):
        c = by_id[name]
        if not c.blocking:
            continue
        held_out = [o.id for o in constraints if o.kind != c.kind and o.blocking and same_subject(o, c)]
        if not passed & set(held_out):
            others = ", ".join(held_out) or "none is declared"
            return (
                f"{name} is spent (training used it), and no held-out verifier of another kind on "
                f"{c.subject.readout!r} passes: {others}"
            )
    return ""


def same_subject(held_out: Constraint, spent: Constraint) -> bool:
    """Whether the one says something about the decision that the other, spent, is about.

    What asks no prompt, or reads something else than the decision (text held out, secrets, the weights), is
    no second opinion on it, although it has a read-out by default.
    """
    about = REGISTRY[held_out.statistic]
    return about.asks and about.reads and about.decides and held_out.read_by == spent.read_by
