"""The rows of kind "rl" in metrics.jsonl: what is read from them, and how they drift as the run goes on.

| key        | meaning                                                                             |
|------------|-------------------------------------------------------------------------------------|
| `kl`       | KL(policy || start) in nats an answer; d is its square root (`kl_k3` if it is negative) |
| `reward`   | the proxy: mean reward that is trained on                                           |
| `gold`     | mean score by what is never trained on; `gold_se` its standard error                |
| `held_out` | mean score by another judge or reward model; stands in where there is no `gold`     |
| the rest   | numbers whose drift is told: `TOLD`                                                 |

A measurement that several updates of one rollout repeat counts once. Rows that a rollback or a resumed run
wrote again count as they were written last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.base.errors import DataError
from glasshouse.base.overopt import scatter
from glasshouse.base.overwatch import Reading, Watch

KIND = "rl"
SCORES = ("gold", "held_out")  # the first of them that a run has is watched
TOLD = ("length", "repetition", "evasive", "entropy", "disagreement", "outlier", "unended", "kl_speed")
BEGINNING = 5  # fewest rows that a drift is measured from
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One gold measurement: distance, score, its standard error, the proxy's score there."""

    d: float
    gold: float
    se: float
    proxy: float | None


@dataclass(frozen=True)
class Drift:
    """A number now against the run's first fifth: both means, and their difference in standard errors."""

    first: float
    last: float
    z: float


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of kind "rl" of the last stage that has any, without those that were written again later.

    [] when the file is missing or has none. DataError for a line that is no JSON object; a last line without
    its newline is still being written, and left out.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            found = row["kind"] == KIND
        except (ValueError, TypeError, KeyError) as problem:
            raise DataError(
                f"{path}:{number}: not a row of metrics ({problem}); restore the file"
            ) from problem
        if found:
            rows.append(row)
    return live(rows)


def live(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of rows in the order written, those of the last stage that still stand."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        stage, step = row.get("stage"), row.get("step", math.inf)
        if kept and (kept[-1].get("stage") != stage or kept[-1].get("step", -1) >= step):
            kept = [r for r in kept if r.get("stage") == stage and r.get("step", -1) < step]
        kept.append(dict(row))
    return kept


def source(rows: Sequence[Row]) -> str | None:
    """Which score is watched: "gold", else "held_out", else None."""
    return next((name for name in SCORES if any(_number(r, name) is not None for r in rows)), None)


def measurements(rows: Sequence[Row]) -> list[Measured]:
    """The run's gold measurements. Where the rows give no standard error, the scatter of the series up to
    each row stands in for it: the level of a watch is then approximate.
    """
    name = source(rows)
    found: list[Measured] = []
    seen: list[float] = []
    before: tuple[Any, ...] | None = None
    for row in rows:
        d, gold = distance(row), None if name is None else _number(row, name)
        now = (row.get("kl"), row.get("reward"), gold)
        if d is None or gold is None or now == before:
            continue
        before = now
        seen.append(gold)
        se = _number(row, f"{name}_se")
        found.append(Measured(d, gold, se if se else scatter(seen), _number(row, "reward")))
    return found


def distance(row: Row) -> float | None:
    """sqrt(KL), None where the row has none."""
    kl = _number(row, "kl")
    if kl is not None and kl < 0:
        kl = _number(row, "kl_k3")  # never negative; the other estimate may be, close to the start
    return None if kl is None else math.sqrt(max(kl, 0.0))


def watched(rows: Sequence[Row], watch: Watch) -> list[Reading]:
    """What ``watch`` says after each of the run's gold measurements."""
    return [watch.take(m.d, m.gold, m.se, m.proxy) for m in measurements(rows)]


def drifts(rows: Sequence[Row]) -> dict[str, Drift]:
    """How the numbers in `TOLD` that the rows have moved, last fifth of the run against the first (at least
    five rows each). No error level: a policy that is trained does move; this says where to."""
    found = {}
    speed = _speed(rows)
    for name in TOLD:
        values = speed if name == "kl_speed" else [_number(r, name) for r in rows]
        known = np.array([v for v in values if v is not None])
        n = max(BEGINNING, len(known) // 5)
        if len(known) < 2 * n:
            continue
        first, last = known[:n], known[-n:]
        spread = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / n)
        moved = float(last.mean() - first.mean())
        z = moved / spread if spread > 0 else math.copysign(1e6, moved) if moved else 0.0
        found[name] = Drift(float(first.mean()), float(last.mean()), max(-1e6, min(1e6, z)))
    return found


def _speed(rows: Sequence[Row]) -> list[float | None]:
    """Nats of KL an update, row by row."""
    places = [(_number(r, "step"), _number(r, "kl")) for r in rows]
    out: list[float | None] = []
    for (step, kl), (later, moved) in pairwise(places):
        if step is None or later is None or kl is None or moved is None or later <= step:
            out.append(None)
        else:
            out.append((moved - kl) / (later - step))
    return out


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
