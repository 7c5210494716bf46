"""The joint between training and verification: the trainer asks a gate, and acts on what it says.

The trainer never learns what a constraint is. It fails closed: a gate that raises, or says something that
makes no sense, holds the checkpoint and can never promote it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from glasshouse.base.canonical import canonical_json
from glasshouse.base.errors import GlasshouseError, Interrupted
from glasshouse.base.plan import DataPlan
from glasshouse.train.directions import read_direction
from glasshouse.train.interventions_config import read_repair

Action = Literal["continue", "hold", "rollback", "stop", "promote"]
MOST_DENSE = 100  # times as often as the recipe says
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. ``digest`` names its exact bytes; ``artifacts`` maps its files to their SHA-256."""

    name: str
    path: Path
    stage: str
    stage_index: int
    step: int
    attempt: int
    update: int
    plan: DataPlan
    digest: str
    artifacts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to do with a checkpoint.

    ``rollback`` needs ``to_checkpoint``; training goes on from there without ``drop_shards``.
    ``promote`` is for the final gate. ``verdicts`` and ``artifacts`` (path within the run -> SHA-256) are
    ledgered. ``densify``: the rest of the stage is gated so many times as often. ``repair`` goes with a
    rollback: an intervention (`interventions_config`) under which everything is trained from there on.
    """

    action: Action
    reason: str
    to_checkpoint: str | None = None
    drop_shards: tuple[str, ...] = ()
    verdicts: tuple[dict[str, Any], ...] = ()
    artifacts: dict[str, str] = field(default_factory=dict)
    densify: int = 1
    repair: dict[str, Any] | None = None


@dataclass(frozen=True)
class GateRecord:
    """A checkpoint and what its gate decided (None: none was asked).

    ``live``: the current weights descend from it, so it can be rolled back to. ``gate`` counts decisions
    from 0.
    """

    checkpoint: Checkpoint
    decision: Decision | None
    live: bool = True
    gate: int | None = None


class Gate(Protocol):
    """Judges a saved checkpoint. Must be a pure function of its arguments and the checkpoint's bytes, so that
    a run killed inside it takes the same decision when resumed."""

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        """``history``: every earlier checkpoint, oldest first, abandoned attempts too. ``final``: may
        promote.
        """
        ...


def ask(
    gate: Gate,
    checkpoint: Checkpoint,
    history: tuple[GateRecord, ...],
    final: bool,
    known_shards: Collection[str],
    run: Path | None = None,
) -> Decision:
    """Ask the gate, and turn an exception or a senseless answer into a ``hold`` that says so.

    ``run`` is the folder that holds the directions of repairs.
    """
    try:
        decision = gate(checkpoint, history, final)
        problem = _problem(decision, checkpoint, history, final, known_shards) or _unrepairable(
            decision, known_shards, run
        )
    except Interrupted:
        raise
    except Exception as error:
        log.exception("the gate raised at checkpoint %s", checkpoint.name)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return Decision("hold", reason=f"error: the gate raised {type(error).__name__} at {place}: {error}")
    if problem:
        log.error("the gate's decision on %s is invalid: %s", checkpoint.name, problem)
        return Decision("hold", reason=f"error: the gate's decision is invalid: {problem}")
    if final and decision.action == "continue":
        # Nothing follows the last gate: without an explicit promotion the checkpoint stays held.
        return replace(decision, action="hold", reason=f"not promoted: {decision.reason}")
    return decision


def _problem(
    decision: Decision,
    checkpoint: Checkpoint,
    history: tuple[GateRecord, ...],
    final: bool,
    known_shards: Collection[str],
) -> str | None:
    """Why a decision cannot be acted on, or None."""
    if not isinstance(decision, Decision) or decision.action not in get_args(Action):
        return f"expected a Decision, got {decision!r:.200}"
    if decision.action == "promote" and not final:
        return "only the final gate may promote"
    if decision.action == "rollback":
        live = [record.checkpoint.name for record in history if record.live]
        if decision.to_checkpoint not in live:
            known = ", ".join(live)
            return f"cannot roll back to {decision.to_checkpoint!r}: {checkpoint.name} descends from {known}"
        unknown = sorted(set(decision.drop_shards) - set(known_shards))
        if unknown:
            return f"cannot drop unknown shard {unknown[0]!r}"
    if type(decision.densify) is not int or not 1 <= decision.densify <= MOST_DENSE:
        return f"densify is a whole number from 1 to {MOST_DENSE}, not {decision.densify!r}"
    try:
        canonical_json([list(decision.verdicts), decision.artifacts, decision.reason, decision.repair])
    except (GlasshouseError, TypeError, ValueError) as error:
        return f"its verdicts cannot be written down: {error}"
    return None


def _unrepairable(decision: Decision, known_shards: Collection[str], run: Path | None) -> str | None:
    """Why a decision's repair cannot be made, or None."""
    if decision.repair is None:
        return None
    if decision.action != "rollback":
        return f"a repair goes with a rollback, not with '{decision.action}'"
    try:
        repair = read_repair(decision.repair)
        if run is not None and hasattr(repair, "direction"):
            read_direction(run, repair.direction.sha256)
    except GlasshouseError as error:
        return str(error)
    unknown = sorted(set(repair.shards) - set(known_shards))
    return f"a repair of unknown shard {unknown[0]!r}" if unknown else None
