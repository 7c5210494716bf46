"""What a verdict asks for: from a line in the log to a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field

from glasshouse.base.config import Frozen
from glasshouse.verify.schema import Asked, Constraint

LADDER: tuple[Asked, ...] = get_args(Asked)  # ever stronger
Level = Literal["lite", "standard", "full"]


class GateConfig(Frozen):
    """How often the gate decides, what it may spend and how far it may go."""

    # Gates, and promotion attempts, that share a constraint's error levels evenly; see `error_share`.
    planned: int = Field(default=20, ge=1)
    attempts: int = Field(default=4, ge=1)
    alpha: float | None = Field(
        default=None, gt=0, lt=0.5, description="of a wrong block, split over constraints by `weight`"
    )
    level: Level = Field(
        default="full", description="what gates may cost, see `cost`; promotion is always full"
    )
    densify: int = Field(
        default=2, ge=1, description="a `warn` makes a stage's gates so many times as frequent"
    )
    false_discoveries: float = Field(
        default=0.05, gt=0, lt=1, description="share of wrong ones among what the report calls broken"
    )
    quarantine_at_most: int = Field(default=1, ge=1, description="shards one rollback may drop")
    max_rollbacks: int = Field(default=3, ge=1, description="this many stop the run for a person")


def levels(constraints: Sequence[Constraint], alpha: float | None) -> dict[str, float]:
    """The error level of each constraint's wrong ``fail`` over a whole run.

    With a gate-wide ``alpha`` those that may block share it by weight, so that together they block a sound
    run with at most that probability (a union bound: nothing is assumed of how they hang together); none gets
    more than its own. Constraints that never block keep theirs. A wrong *pass* needs no split: a promotion is
    wrong only where some broken constraint passes, whose own level bounds that.
    """
    own = {c.id: c.alpha for c in constraints}
    blocking = {c.id: c.weight or 1.0 for c in constraints if c.blocking}
    if alpha is None or not blocking:
        return own
    whole = sum(blocking.values())
    return own | {name: min(own[name], alpha * part / whole) for name, part in blocking.items()}


def asked_by(constraint: Constraint, verdict: dict[str, Any], *, required: bool, final: bool) -> Asked:
    """What one verdict asks for. ``required``: ``not_applicable`` counts against the checkpoint by now."""
    match verdict["status"]:
        case "pass":
            return "log"
        case "fail":
            steps = constraint.ladder
            return steps[min(max(verdict.get("failures", 1), 1), len(steps)) - 1]
        case "undecided" if constraint.blocking:
            return "hold" if final else constraint.on_undecided
        case "not_applicable" if constraint.blocking:
            return "hold" if required or final else "log"
        case "error" if constraint.blocking:
            return "hold"
        case "undecided" | "not_applicable" | "error":
            return "log"
    return "stop"  # no status that a check can have: whoever wrote it must be looked at
