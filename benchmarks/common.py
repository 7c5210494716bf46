"""What every benchmark needs: where it ran, whether anybody disturbed it, and rows in one shape."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.atomic import write_json
from glasshouse.train.identity import cpu_name

RESULTS = Path(__file__).parent / "results"
# Above this share of the machine taken by others, a timing says more about them than about us.
FOREIGN_LIMIT = 0.10


def machine(dtype: str | None = None) -> str:
    """Where this ran, in a line."""
    where = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, {where}"
    return f"{where}, {dtype}" if dtype else where


def commit() -> str | None:
    """The commit that was measured, "-dirty" if tracked files have changes, None outside git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def row(
    metric: str,
    value: float | None,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    goal: str | None = None,
    met: bool | None = None,
    seeds: int | list[int] = 1,
    **more: Any,
) -> dict[str, Any]:
    """One row of ``results/<name>.json``."""
    about = {"goal": goal, "met": met, "seeds": seeds, "machine": machine(), "commit": commit()}
    return {"metric": metric, "value": value, "peer": peer, "peer_value": peer_value} | about | more


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/<name>.json`` and print the rows as a table."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, rows)
    table = [("metric", "value", "peer", "peer value", "goal", "met")]
    table += [
        (
            r["metric"],
            _short(r["value"]),
            r["peer"] or "",
            _short(r["peer_value"]),
            r["goal"] or "",
            _yes(r["met"]),
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(6)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"wrote {path}: {len(json.dumps(rows))} bytes")
    return path


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _yes(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "NO"


class Quiet:
    """Tells how much of the machine others used while a block ran: ``with Quiet() as q: ...; q.foreign``.

    ``foreign`` is the share of all cores' time that was busy and neither ours nor our children's; a machine
    whose /proc/stat cannot be read gives None. What a hypervisor stole counts as foreign.
    """

    foreign: float | None = None

    def __enter__(self) -> Quiet:
        self._began, self._busy, self._own = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(self, *_: object) -> None:
        busy, elapsed = _busy(), time.perf_counter() - self._began
        if busy is not None and self._busy is not None and elapsed > 0:
            foreign = (busy - self._busy) - (_own() - self._own)
            self.foreign = max(0.0, foreign / (elapsed * (os.cpu_count() or 1)))

    @property
    def disturbed(self) -> bool:
        """Whether others took more than `FOREIGN_LIMIT`."""
        return self.foreign is not None and self.foreign > FOREIGN_LIMIT


def _busy() -> float | None:
    """Seconds that all cores together were busy since boot."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    ticks = [int(f) for f in fields[:8]]  # user nice system idle iowait irq softirq steal
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Processor seconds of this process, of its descendants alive now, and of children that have ended."""
    t, tick = os.times(), os.sysconf("SC_CLK_TCK")
    total = t.user + t.system + t.children_user + t.children_system
    family = {os.getpid()}
    found: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        found[int(entry.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    for pid in sorted(found):
        if found[pid][0] in family:
            family.add(pid)
            total += found[pid][1] / tick
    return total


def interleave(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, turn by turn, so that a busy moment falls on all alike; ``warm`` rounds before
    are not counted.
    """
    took: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm + rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn >= warm:
                took[name].append(time.perf_counter() - began)
    return took


def medians(took: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contestant's seconds."""
    return {name: statistics.median(seconds) for name, seconds in took.items()}
