"""The watch on a proxy while a run of RL is going on: what `verify` reads from the run's files afterwards.

The arithmetic is in `base.overopt` (the curve), `base.overwatch` (the alarm) and `base.rlrows` (which
numbers of a row are read), because the constraint `overoptimisation` needs the same and may not depend on
this room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.base.overopt import Form, Peak
from glasshouse.base.overwatch import Reading, Watch
from glasshouse.base.rlrows import Drift, drifts, measurements, read_rows, source


@dataclass(frozen=True)
class Report:
    """A run of RL so far: the last reading of the watch, where it raised its alarm (a distance; None:
    nowhere), and what drifted. ``score`` names the score that was watched, None where the rows have none.
    """

    score: str | None
    n: int
    reading: Reading | None
    flagged_at: float | None
    drift: dict[str, Drift]

    @property
    def peak(self) -> Peak | None:
        """Where the gold score is foretold to peak, from what was seen."""
        return None if self.reading is None or self.reading.curve is None else self.reading.curve.peak

    @property
    def says(self) -> str:
        """ "flagged", "near", "clear", or "blind": no score to watch, or too few measurements."""
        if self.flagged_at is not None:
            return "flagged"
        if self.reading is None or self.reading.curve is None:
            return "blind"
        return "near" if self.reading.near else "clear"


def report(rows: Sequence[Mapping[str, Any]], level: float = 0.05, form: Form = "rl") -> Report:
    """What the watch says of rows of kind "rl", in the order of the run."""
    watch, found = Watch(level, form), measurements(rows)
    reading = None
    for m in found:
        reading = watch.take(m.d, m.gold, m.se, m.proxy)
    flagged = None if watch.alarm_at is None else found[watch.alarm_at].d
    return Report(source(rows), len(found), reading, flagged, drifts(rows))


def report_file(metrics: Path, level: float = 0.05, form: Form = "rl") -> Report:
    """The same of a run's metrics.jsonl. Raises as `base.rlrows.read_rows`."""
    return report(read_rows(metrics), level, form)


class Online:
    """The watch row by row. ``level`` bounds the chance that an honest run is ever flagged."""

    def __init__(self, level: float = 0.05, form: Form = "rl") -> None:
        self._watch, self._rows, self._seen = Watch(level, form), list[Mapping[str, Any]](), 0

    def take(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Add a row of kind "rl"; return numbers to write into it, none where it measures nothing new.

        "watch" is the evidence as a share of what raises the alarm, "flagged" 0 or 1 and stays 1, "peak_d"
        the distance at which the gold score is foretold to peak.
        """
        self._rows.append(row)
        found = measurements(self._rows)
        if len(found) == self._seen:
            return {}
        self._seen, m = len(found), found[-1]
        reading = self._watch.take(m.d, m.gold, m.se, m.proxy)
        peak = None if reading.curve is None else reading.curve.peak
        told = {"watch": reading.value, "flagged": float(reading.alarm)}
        return told | (
            {"peak_d": peak.d, "peak_low": peak.low, "peak_high": peak.high} if peak is not None else {}
        )
