"""The watch on a proxy while a run of RL is going on: what `verify` reads from the run's files afterwards.

The arithmetic is in `base.overopt` (the curve), `base.overwatch` (the alarm) and `base.rlrows` (which
numbers of a row are read), because the constraint `overoptimisation` needs the same and may not depend on
this room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.base.errors import Halt
from glasshouse.base.overopt import Form, Peak
from glasshouse.base.overwatch import Reading, Watch
from glasshouse.base.rlrows import SCORES, Drift, drifts, measurements, read_rows, source


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


class ProxyParted(Halt):
    """The reward that is trained on has parted from what it is for: the watch raised its alarm."""


KEPT = ("kl", "kl_k3", "reward", *(f"{name}{what}" for name in SCORES for what in ("", "_se")))


class Online:
    """The watch row by row. ``level`` bounds the chance that an honest run is ever flagged."""

    def __init__(self, level: float = 0.05, form: Form = "rl") -> None:
        self.level, self.form = level, form
        self.again([])

    def again(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin anew, with rows that were taken before (`kept` of a checkpoint)."""
        self._watch, self._rows, self._seen = Watch(self.level, self.form), list[Mapping[str, Any]](), 0
        for row in rows:
            self.take(row)

    @property
    def kept(self) -> list[dict[str, Any]]:
        """What of the rows so far the watch has to see again after a restart."""
        return [{key: row[key] for key in KEPT if key in row} for row in self._rows]

    def take(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Add a row of kind "rl"; return numbers to write into it, none where it measures nothing new.

        "watch" is the evidence as a share of what raises the alarm, "flagged" 0 or 1 and stays 1, "peak_d"
        the distance at which the gold score is foretold to peak with the interval "peak_low" to "peak_high",
        "peak_gold" the score foretold there, "fitted" the fitted curve here, "lost" the share of its gain
        that is gone. An interval without an end has no "peak_high".
        """
        self._rows.append(row)
        found = measurements(self._rows)
        if len(found) == self._seen:
            return {}
        self._seen, m = len(found), found[-1]
        reading = self._watch.take(m.d, m.gold, m.se, m.proxy)
        told = {"watch": reading.value, "flagged": float(reading.alarm), "d": m.d}
        if reading.curve is not None:
            told |= {"fitted": reading.curve.at(m.d)[0], "lost": reading.lost or 0.0}
            if (peak := reading.curve.peak) is not None:
                told |= {
                    "peak_d": peak.d,
                    "peak_low": peak.low,
                    "peak_high": peak.high,
                    "peak_gold": peak.score,
                }
        return {key: float(x) for key, x in told.items() if math.isfinite(x)}
