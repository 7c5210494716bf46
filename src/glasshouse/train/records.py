"""What a run writes down while it trains: rows of metrics, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from glasshouse.base.run import RunFolder
from glasshouse.train.config import Stage
from glasshouse.train.fold import Position
from glasshouse.train.metrics import MetricsLog
from glasshouse.train.progress import Progress


class Records:
    """Rows go to metrics.jsonl and to whoever watches. Rows of training on while a gate judges are held back
    until its decision is written, so that the file does not depend on which was faster.
    """

    def __init__(self, run: RunFolder, at: Position, stages: Sequence[Stage], progress: Progress):
        self.metrics, self.progress, self.stages = MetricsLog(run.metrics, at.metrics_bytes), progress, stages
        self.began = time.perf_counter() - at.elapsed_s  # the clock stands still while no process runs
        self.held: list[dict[str, Any]] | None = None

    def elapsed(self) -> float:
        """Seconds of the run, over all its processes."""
        return round(time.perf_counter() - self.began, 3)

    def row(self, at: Position, kind: str, index: int, step: int, update: int) -> dict[str, Any]:
        """What every row begins with."""
        place = {"stage": self.stages[index].name, "step": step, "attempt": at.attempt, "kind": kind}
        return {"t": self.elapsed(), "update": update, **place}

    def log(self, row: dict[str, Any]) -> None:
        """Write a row, now or when it is let go, and show it."""
        if self.held is not None:
            self.held.append(row)
        else:
            self.metrics.append(row)
        self.progress.row(row)

    def hold(self) -> None:
        """From now on hold rows back."""
        self.held = []

    def release(self) -> list[dict[str, Any]]:
        """Write rows at once again; the rows held until now."""
        held, self.held = self.held or [], None
        return held

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows that were shown already."""
        for row in rows:
            self.metrics.append(row)

    def sync(self) -> dict[str, Any]:
        """Make all rows durable; what a ledger entry says of them and of the time."""
        return {"metrics_bytes": self.metrics.sync(), "elapsed_s": self.elapsed()}

    def close(self) -> None:
        """Close the file and the display."""
        self.metrics.close()
        self.progress.close()
