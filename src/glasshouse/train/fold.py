"""Where a run stands, as a pure fold over its ledger.

Nothing else is remembered between processes. A crash at any instant leaves a ledger that ends at some entry,
and the next action follows from the entries alone, so resuming is what the loop does anyway:

    nothing yet      -> save the initial weights ("checkpoint")
    "checkpoint"     -> ask the gate if one is due, else train on
    "decision"       -> train on | roll back (another head, another plan) | stop | finish
    "spike"          -> train the same head again without the batches behind it | stop
    "stop"           -> wait for a person; "resume" with after_stop goes on
    "finish"         -> nothing
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glasshouse.base.errors import LedgerError
from glasshouse.base.plan import DataPlan

Phase = Literal["new", "train", "gate", "stopped", "decided", "finished"]


@dataclass(frozen=True)
class Mark:
    """One ledgered checkpoint. ``gate``: index of the gate due at it; ``last``: nothing follows it."""

    name: str
    stage: str
    stage_index: int
    step: int
    attempt: int
    update: int
    parent: str | None
    why: str
    gate: int | None
    last: bool
    body: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Drop:
    """Shards quarantined from a step of a stage on, in that stage and all later ones."""

    shards: tuple[str, ...]
    stage_index: int
    from_step: int


@dataclass(frozen=True)
class Skip:
    """Steps of a stage whose batches are left out, ``first`` to ``last``: a rewind found them wanting."""

    stage_index: int
    first: int
    last: int


@dataclass(frozen=True)
class Position:
    """Where the run stands. ``head`` names the checkpoint whose state training continues from.

    ``repairs`` are those that rollbacks asked for: they hold from then on, wherever the head is. ``dense``:
    stage index -> how many times as often as its recipe says the stage is gated.
    """

    phase: Phase = "new"
    head: str | None = None
    attempt: int = 0
    update: int = 0
    rollbacks: int = 0
    rewinds: int = 0
    gates: int = 0
    promoted: bool = False
    reason: str = ""
    drops: tuple[Drop, ...] = ()
    skips: tuple[Skip, ...] = ()
    repairs: tuple[Mapping[str, Any], ...] = ()
    dense: Mapping[int, int] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)
    decisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics_bytes: int = 0
    elapsed_s: float = 0.0

    @property
    def at_head(self) -> Mark:
        """The mark of the head. Raises LedgerError before the first checkpoint."""
        if self.head is None:
            raise LedgerError("the run has no checkpoint yet")
        return self.marks[self.head]

    def lineage(self) -> tuple[str, ...]:
        """Names from the initial checkpoint to the head: what the current weights descend from."""
        names: list[str] = []
        at = self.head
        while at is not None:
            names.append(at)
            at = self.marks[at].parent
        return tuple(reversed(names))

    def left_out(self, stage_index: int, step: int) -> bool:
        """Whether the batch of this step is left out since a rewind."""
        return any(s.stage_index == stage_index and s.first <= step <= s.last for s in self.skips)

    def plan_for(self, stage_index: int, plan: DataPlan) -> DataPlan:
        """The recipe's ``plan`` of a stage without what was quarantined. Raises DataError if nothing is
        left.
        """
        for drop in self.drops:
            shards = [name for name in drop.shards if name in plan.shards]
            if shards and stage_index >= drop.stage_index:
                plan = plan.without(shards, drop.from_step if stage_index == drop.stage_index else 0)
        return plan

    def next_gate(self, stage_index: int, every: int, step: int) -> int:
        """The first step after ``step`` at which a gate is due that the recipe asks for ``every`` so many
        steps (> 0): denser since a decision, the recipe's own among them.
        """
        times = self.dense.get(stage_index, 1)
        start = step - step % every
        return next(at for j in range(1, times + 1) if (at := start + every * j // times) > step)

    def after_rollback(
        self,
        to_checkpoint: str,
        drop_shards: Iterable[str],
        repair: Mapping[str, Any] | None = None,
    ) -> Position:
        """The position after rolling back: an older head, a new attempt, and every quarantine and repair so
        far kept.

        Earlier quarantines are repeated from here on, because this head may lie before where they began.
        """
        target = self.marks[to_checkpoint]
        shards = {shard for drop in self.drops for shard in drop.shards} | set(drop_shards)
        drops = self.drops
        if shards:
            drops = (*drops, Drop(tuple(sorted(shards)), target.stage_index, target.step))
        return replace(
            self,
            phase="train",
            head=to_checkpoint,
            attempt=self.attempt + 1,
            rollbacks=self.rollbacks + 1,
            drops=drops,
            # One that drops data has done so by ``drop_shards``.
            repairs=self.repairs if repair is None or repair["kind"] == "drop" else (*self.repairs, repair),
        )


def position(entries: Iterable[Mapping[str, Any]]) -> Position:
    """Fold ledger entries (``{"seq", "kind", "body", ...}``) into the run's position.

    Raises LedgerError, naming the entry, when entries contradict each other.
    """
    at = Position()
    for entry in entries:
        step = FOLD.get(entry["kind"])
        if step is not None:
            try:
                at = step(at, entry["body"])
            except KeyError as missing:
                raise LedgerError(
                    f"ledger entry {entry.get('seq')} ({entry['kind']}) lacks {missing}"
                ) from None
            except LedgerError as error:
                raise LedgerError(f"ledger entry {entry.get('seq')} ({entry['kind']}): {error}") from None
    return at


def _checkpoint(at: Position, body: Mapping[str, Any]) -> Position:
    name, gate, last = body["checkpoint"], body["gate"], body["last"]
    if at.phase not in ("new", "train"):
        raise LedgerError(f"a checkpoint while the run's phase is '{at.phase}'")
    if name in at.marks or body["parent"] != at.head:
        raise LedgerError(f"checkpoint {name} is there already or does not follow {at.head}")
    keys = ("stage", "stage_index", "step", "attempt", "update", "parent", "why")
    mark = Mark(name=name, gate=gate, last=last, body=body, **{key: body[key] for key in keys})
    if mark.attempt != at.attempt or mark.update < at.update:
        raise LedgerError(
            f"checkpoint {name} is of attempt {mark.attempt}, but attempt {at.attempt} is under way"
        )
    return replace(
        at,
        phase="gate" if gate is not None else "decided" if last else "train",
        head=name,
        update=mark.update,
        marks={**at.marks, name: mark},
        metrics_bytes=body["metrics_bytes"],
        elapsed_s=body["elapsed_s"],
    )


def _decision(at: Position, body: Mapping[str, Any]) -> Position:
    if at.phase != "gate" or body["checkpoint"] != at.head or body["gate"] != at.at_head.gate:
        raise LedgerError(f"a decision on {body['checkpoint']}, which no gate was asked about")
    action, mark = body["action"], at.at_head
    at = replace(
        at,
        gates=at.gates + 1,
        reason=body["reason"],
        decisions={**at.decisions, mark.name: body},
        metrics_bytes=body["metrics_bytes"],
        elapsed_s=body["elapsed_s"],
        dense=_denser(at, body),
    )
    match action:
        case "rollback":
            if body["to_checkpoint"] not in at.lineage()[:-1]:
                raise LedgerError(
                    f"a rollback to {body['to_checkpoint']}, which {mark.name} does not descend from"
                )
            return at.after_rollback(body["to_checkpoint"], body["drop_shards"], body.get("repair"))
        case "stop":
            return replace(at, phase="stopped")
        case "promote" if mark.last:
            return replace(at, phase="decided", promoted=True)
        case "continue" | "hold":
            return replace(at, phase="decided" if mark.last else "train")
    raise LedgerError(f"unknown or misplaced action '{action}'")


def _denser(at: Position, body: Mapping[str, Any]) -> Mapping[int, int]:
    """How often stages are gated after a decision: the rest of the head's stage, and of that gone back to."""
    times = body.get("densify", 1)
    if times == 1:
        return at.dense
    target = at.marks.get(body.get("to_checkpoint") or "", at.at_head)
    stages = {at.at_head.stage_index, target.stage_index}
    return {**at.dense, **{index: max(times, at.dense.get(index, 1)) for index in stages}}


def _spike(at: Position, body: Mapping[str, Any]) -> Position:
    """Train the head again, as a new attempt and without the batches that led to the spike; or stop first."""
    if at.phase != "train" or body["checkpoint"] != at.head or body["action"] not in ("rewind", "stop"):
        raise LedgerError(f"a spike after {body['checkpoint']} while the run is at {at.head} ({at.phase})")
    first, last = body["left_out"]
    return replace(
        at,
        phase="stopped" if body["action"] == "stop" else "train",
        attempt=at.attempt + 1,
        update=body["update"],
        rewinds=at.rewinds + 1,
        reason=body["reason"],
        skips=(*at.skips, Skip(body["stage_index"], first, last)),
        metrics_bytes=body["metrics_bytes"],
        elapsed_s=body["elapsed_s"],
    )


def _stop(at: Position, body: Mapping[str, Any]) -> Position:
    return replace(at, phase="stopped", reason=body["reason"])


def _resume(at: Position, body: Mapping[str, Any]) -> Position:
    """A person lets a stopped run go on: the rollback that the loop refused is done, and counting starts
    anew.
    """
    if not body.get("after_stop"):
        return at
    if at.phase != "stopped":
        raise LedgerError("a resume after a stop, but the run had not stopped")
    decision = at.decisions.get(at.at_head.name, {})
    if decision.get("asked") == "rollback":
        back = at.after_rollback(decision["to_checkpoint"], decision["drop_shards"], decision.get("repair"))
        return replace(back, rollbacks=0, rewinds=0)
    return replace(at, phase="decided" if at.at_head.last else "train", rollbacks=0, rewinds=0)


def _finish(at: Position, body: Mapping[str, Any]) -> Position:
    if at.phase != "decided" or body["checkpoint"] != at.head or body["promoted"] != at.promoted:
        raise LedgerError(f"the run cannot finish with {body['checkpoint']} while its phase is '{at.phase}'")
    return replace(at, phase="finished")


FOLD = {
    "checkpoint": _checkpoint,
    "decision": _decision,
    "spike": _spike,
    "stop": _stop,
    "resume": _resume,
    "finish": _finish,
}
