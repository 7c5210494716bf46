"""One check, from what it is given to the verdict that is written down. It fails closed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from glasshouse.base.canonical import canonical_json
from glasshouse.base.errors import GlasshouseError, Interrupted, VerificationError
from glasshouse.evals.subject import BudgetSpent
from glasshouse.verify.checks import CHECKS
from glasshouse.verify.detector import follow
from glasshouse.verify.examination import Examination, Finding, settle
from glasshouse.verify.limits import TimeUp, time_limit
from glasshouse.verify.schema import Constraint

log = logging.getLogger(__name__)
DECIDED = ("pass", "fail")


def in_order(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Unconditional behaviours first: other constraints may apply only when those hold."""
    return sorted(constraints, key=presupposes)


def presupposes(c: Constraint) -> bool:
    """Whether a constraint comes after those that others presuppose."""
    return c.kind != "behaviour" or c.applies_when is not None


def with_premises(due: Sequence[Constraint], every: Sequence[Constraint]) -> list[Constraint]:
    """``due``, and the behaviours that they presuppose: unmeasured ones would leave them not applicable."""
    needed = {c.applies_when.behaviour for c in due if c.applies_when is not None}
    while (
        more := {c.applies_when.behaviour for c in every if c.id in needed and c.applies_when is not None}
        - needed
    ):
        needed |= more
    return [c for c in every if c in due or c.id in needed]


def check(exam: Examination, measured: dict[str, float | None], model_digest: str) -> dict[str, Any]:
    """One verdict. An exception is the verdict ``error``, which blocks: a check that broke passed nothing.

    So is a check that its ``timeout_s`` ended, that decided without an estimate, or whose evidence cannot be
    written down.
    """
    started, c = time.perf_counter(), exam.constraint
    try:
        with time_limit(c.timeout_s):
            finding = follow(exam, settle(not_applicable(exam, measured) or CHECKS[c.statistic](exam)))
        require_evidence(finding, c)
    except Interrupted:
        raise
    except TimeUp:
        finding = Finding(
            "error", reason=f"not finished within timeout_s = {c.timeout_s:g}; nothing was decided"
        )
    except BudgetSpent as problem:
        finding = Finding("undecided", reason=str(problem))
    except GlasshouseError as problem:
        finding = Finding("error", reason=str(problem))
    except Exception as problem:
        log.exception("constraint %s raised", c.id)
        finding = Finding("error", reason=f"{type(problem).__name__}: {problem}")
    return as_verdict(exam, finding, model_digest, time.perf_counter() - started)


def require_evidence(finding: Finding, constraint: Constraint) -> None:
    """VerificationError where a finding could not stand in the ledger, or decides on nothing."""
    if finding.estimate is not None and not math.isfinite(finding.estimate):
        raise VerificationError(f"the estimate is {finding.estimate}; nothing was measured")
    if finding.status in DECIDED and finding.estimate is None:
        raise VerificationError(f"a {finding.status} without an estimate; nothing was measured")
    if finding.status in DECIDED and finding.control is None and constraint.control is not None:
        raise VerificationError(
            f"a {finding.status} without its control ({constraint.control.subject}), which was not taken"
        )
    numbers = [list(finding.interval or ()), finding.e_fail, finding.e_pass]
    try:
        canonical_json([finding.evidence, finding.coverage, finding.control, finding.memory, numbers])
    except (GlasshouseError, TypeError, ValueError) as problem:
        raise VerificationError(f"its evidence cannot be written down: {problem}") from problem


def as_verdict(exam: Examination, finding: Finding, model_digest: str, seconds: float) -> dict[str, Any]:
    """A finding with everything it rests on."""
    c = exam.constraint
    verdict = {
        "constraint": c.id,
        "kind": c.kind,
        "claim": c.claim,
        "status": finding.status,
        "statistic": c.statistic,
        "estimate": finding.estimate,
        "interval": list(finding.interval) if finding.interval is not None else None,
        "n": finding.n,
        "e_fail": finding.e_fail,
        "e_pass": finding.e_pass,
        "bound": c.bound.as_row(),
        "alpha": c.alpha,
        "coverage": finding.coverage,
        "control": finding.control,
        "baseline": finding.baseline,
        "evidence": finding.evidence,
        "reason": finding.reason,
        "dtype": exam.subject.measured_in,
        "attention": "fused",
        "digests": {"model": model_digest, "recipe": exam.seed[0], "constraint": c.digest()},
        "seconds": round(seconds, 3),
        "passes": exam.subject.passes,
    }
    return verdict | ({"memory": finding.memory} if finding.memory else {})


def not_applicable(exam: Examination, measured: dict[str, float | None]) -> Finding | None:
    """``not_applicable`` when the behaviour this constraint presupposes is not there, else None."""
    when = exam.constraint.applies_when
    if when is None:
        return None
    value = measured.get(when.behaviour)
    if value is None or value < when.at_least:
        shown = "was not measured" if value is None else f"is {value:.2f}, below {when.at_least:.2f}"
        return Finding("not_applicable", reason=f"{when.behaviour} {shown}")
    return None
