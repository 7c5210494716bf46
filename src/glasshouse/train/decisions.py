"""Between gate and ledger: what the gate is told, and what the loop does about its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glasshouse.base.errors import DataError
from glasshouse.base.run import RunFolder
from glasshouse.train import checkpoint as saving
from glasshouse.train.config import Stage
from glasshouse.train.fold import Position
from glasshouse.train.gate import Decision, GateRecord

STANDING = {
    "continue": "passed",
    "hold": "held",
    "stop": "held",
    "promote": "promoted",
    "rollback": "quarantined",
}


def decision_body(
    at: Position, decision: Decision, stages: Sequence[Stage], max_rollbacks: int
) -> dict[str, Any]:
    """The body of the ledger's "decision" entry: ``asked`` is what the gate said, ``action`` what is done.

    They differ when a rollback would leave no data, or is one too many: then the run stops for a person.
    ``standing`` says what the decision means for the checkpoint, and for all that a rollback abandons.
    """
    action, asked, reason = decision.action, decision.action, decision.reason
    dropped = sorted(decision.drop_shards)
    if decision.repair is not None and decision.repair["kind"] == "drop":
        dropped = sorted({*dropped, *decision.repair["shards"]})
    if action == "rollback":
        try:
            ahead = at.after_rollback(decision.to_checkpoint or "", dropped)
            for index, stage in enumerate(stages):
                ahead.plan_for(index, stage.plan)
        except DataError as error:
            action, asked, reason = "stop", "stop", f"{reason}; the rollback is impossible: {error}"
        if at.rollbacks + 1 >= max_rollbacks:
            action = "stop"
            reason += f"; {at.rollbacks + 1} rollbacks were asked for, and so many stop a run for a person"
    abandoned = [at.at_head.name]
    if action == "rollback":
        lineage = at.lineage()
        abandoned = list(lineage[lineage.index(decision.to_checkpoint or "") + 1 :])
    return {
        "gate": at.gates,
        "checkpoint": at.head,
        "action": action,
        "asked": asked,
        "to_checkpoint": decision.to_checkpoint,
        "drop_shards": dropped,
        "reason": reason,
        "final": at.at_head.last,
        "standing": {name: STANDING[action] for name in abandoned},
        "verdicts": list(decision.verdicts),
        "artifacts": dict(decision.artifacts),
        "densify": decision.densify,
        "repair": decision.repair,
    }


def history(run: RunFolder, at: Position) -> tuple[GateRecord, ...]:
    """Every checkpoint before the head, oldest first, with what its gate decided; abandoned attempts
    included.

    Checkpoints that a Ctrl-C left are not in it: a gate's decision must not depend on when someone
    interrupted.
    """
    live = set(at.lineage())
    records = []
    for name, mark in at.marks.items():
        if name == at.head or mark.why == "interrupt":
            continue
        body = at.decisions.get(name)
        decision = None
        if body is not None:
            decision = Decision(
                body["asked"],
                body["reason"],
                body["to_checkpoint"],
                tuple(body["drop_shards"]),
                tuple(body["verdicts"]),
                dict(body["artifacts"]),
                body.get("densify", 1),
                body.get("repair"),
            )
        records.append(GateRecord(saving.from_ledger(run, mark.body), decision, name in live, mark.gate))
    return tuple(records)
