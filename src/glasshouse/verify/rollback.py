"""Where to go back to."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from glasshouse.base.plan import DataPlan
from glasshouse.train import Checkpoint, GateRecord


def rollback_target(
    history: Sequence[GateRecord], failed: Checkpoint, dropped: Collection[str]
) -> Checkpoint | None:
    """The last non-failing checkpoint before the first batch of any dropped shard, else the stage's start.

    ``history`` is oldest first. Only live checkpoints (ancestors of the failed one) count. One at which no
    gate was asked counts as non-failing only where a stage starts: the run's first and each stage's last.
    None when there is no ancestor at all.
    """
    live = [r for r in history if r.live]
    plans = {r.checkpoint.stage_index: r.checkpoint.plan for r in live} | {failed.stage_index: failed.plan}
    ends = {r.checkpoint.stage_index: r.checkpoint.name for r in live}  # the latest of each stage stays
    ends.pop(failed.stage_index, None)
    boundaries = {*ends.values(), *(r.checkpoint.name for r in live[:1])}
    for record in reversed(live):
        judged = record.decision is not None or record.checkpoint.name in boundaries
        if judged and not _failing(record) and _before(record.checkpoint, plans, dropped):
            return record.checkpoint
    starts = [r.checkpoint for r in live if r.checkpoint.stage_index < failed.stage_index]
    return starts[-1] if starts else (live[0].checkpoint if live else None)


def _failing(record: GateRecord) -> bool:
    verdicts = record.decision.verdicts if record.decision is not None else ()
    return any(v["status"] in ("fail", "error") for v in verdicts)


def _before(checkpoint: Checkpoint, plans: dict[int, DataPlan], dropped: Collection[str]) -> bool:
    """Whether no dropped shard was drawn from before this checkpoint was saved."""
    for index, plan in plans.items():
        for shard in dropped:
            first = plan.first_step(shard)
            if first is None or index > checkpoint.stage_index:
                continue
            if index < checkpoint.stage_index or first < checkpoint.step:
                return False
    return True
