"""Build a zoo and run it: every organism grown and examined once, in worker processes, resumable at any kill.

A zoo holds its plan (``zoo.json``), its ledger, ``worlds/``, a file per organism in ``results/`` and,
while they grow, run folders in ``growing/``. A result is written whole or not at all, and nothing else says
that an organism is done, so whatever kills a zoo costs at most the organisms that were under way.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glasshouse import __version__
from glasshouse.base.atomic import sweep_temporaries, write_json
from glasshouse.base.chain import read_entries
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import CheckpointError, DataError, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.recipes.zoo import method
from glasshouse.recipes.zoo.examine import FROZEN, Task, examine, make_worlds
from glasshouse.recipes.zoo.judge import outcome
from glasshouse.recipes.zoo.schedule import FILE, Job, read_plan, write_plan
from glasshouse.recipes.zoo.score import Scored, family_row, twins_row
from glasshouse.recipes.zoo.workers import Pool, alive
from glasshouse.recipes.zoo.world import Size

MOST_HOURS = 2.0  # of one slice; the next call goes on
LINGER_S = 3.0  # for which workers may outlive a zoo that was killed
SLOW_S = 1800.0  # an organism that takes longer is ended and tried once more


@dataclass(frozen=True)
class Zoo:
    """An open zoo."""

    folder: Path
    jobs: tuple[Job, ...]
    about: dict[str, Any]

    def result(self, job: Job) -> Path:
        """Where a job's result is, once it is done."""
        return self.folder / "results" / f"{job.id}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        """A job's result, None while there is none. DataError for a file that is no result."""
        path = self.result(job)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["id"] != job.id or found["status"] not in ("grown", "not-grown", "broken"):
                raise ValueError(f"it is about {found['id']!r}, {found['status']!r}")
            str(found["method"])
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{path} is no result of {job.id} ({problem}): remove it, and `glasshouse zoo run` grows "
                "that organism again"
            ) from problem
        return dict(found)


@dataclass(frozen=True)
class Told:
    """What is said after each organism: how many of how many are done, and how the last one went."""

    done: int
    of: int
    result: dict[str, Any]


def build(
    folder: Path,
    jobs: Sequence[Job],
    *,
    n: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
    size: Size | None = None,
) -> Zoo:
    """Write the plan of a new zoo and make its worlds, of another ``size`` than usual for a test.

    Building the same plan again only makes the worlds that are missing. UsageError when another zoo is there.
    """
    if not jobs:
        raise UsageError("a zoo needs at least one organism; give --families or --seeds that hold some")
    made = RunFolder(folder)
    with made.lock():
        names = [j.id for j in jobs]
        if (folder / FILE).is_file():
            there, _ = read_plan(folder)
            if [j.id for j in there] != names:
                raise UsageError(
                    f"{folder} holds a zoo with another plan (of {len(there)}, not of {len(names)}): "
                    "run that one without --families, --seeds or --quick, or name another folder"
                )
        else:
            about = {"version": __version__, "built": int(time.time()), "method_when_built": method.digest()}
            about["size"] = asdict(size or Size())
            Ledger(made.ledger, signing_key()).append("zoo", {"jobs": names, **about})
            write_plan(folder, jobs, **about)
        zoo = Zoo(folder, *read_plan(folder))
        make_worlds(folder, zoo.jobs, n or cores(), tell)
    return zoo


def open_zoo(folder: Path) -> Zoo:
    """A zoo that was built. UsageError when there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; `glasshouse zoo build {folder}` makes a zoo there")
    return Zoo(folder, *read_plan(folder))


def run(
    zoo: Zoo,
    *,
    only: Callable[[Job], bool] = lambda _: True,
    n: int | None = None,
    hours: float = MOST_HOURS,
    again: bool = False,
    keep: bool = False,
) -> Iterator[Told]:
    """Grow and examine what is not done, yielding as it ends; at most ``hours``, then the next call goes on.

    ``only`` chooses jobs of the plan. ``again`` allows what was run under another method, or is frozen, to be
    run anew: earlier results are moved aside and the ledger says so. ``keep`` keeps run folders. Raises
    UsageError (another method, nothing chosen), RunBusyError, DiskError, Interrupted.
    """
    if not 0 < hours <= MOST_HOURS:
        raise UsageError(f"--hours {hours:g}: one slice lasts more than 0 and at most {MOST_HOURS:g} hours")
    jobs = [j for j in zoo.jobs if only(j)]
    if not jobs:
        raise UsageError(f"{zoo.folder}: its plan holds nothing of what you chose; see {zoo.folder / FILE}")
    began = time.monotonic()
    with RunFolder(zoo.folder).lock():
        found = method.sources()
        digest = method.digest(found)
        ledger = Ledger(RunFolder(zoo.folder).ledger, signing_key())
        sweep(zoo.folder)
        set_aside(zoo, jobs, digest, ledger, again)
        if not any(e["body"]["digest"] == digest for e in ledger.entries("method")):
            ledger.append("method", {"digest": digest, "sources": found})
        frozen = [f for f in dict.fromkeys(j.family for j in jobs) if f in FROZEN]
        method.allow_frozen(frozen, digest, zoo.folder, ledger, again=again)
        left = [j for j in jobs if (zoo.read(j) or {"status": "broken"})["status"] == "broken"]
        done = len(jobs) - len(left)
        ledger.append("slice", {"method": digest, "left": len(left), "hours": hours, "jobs": n or cores()})
        pool = Pool(examine, n or cores(), SLOW_S)
        tasks = [Task(zoo.folder.resolve(), j.id, digest, keep) for j in left]
        for ended in pool.run(tasks, until=began + 3600 * hours):
            done += 1
            if ended.problem:
                broken = {"id": ended.job.id, "status": "broken", "reason": ended.problem, "method": digest}
                write_json(zoo.folder / "results" / f"{ended.job.id}.json", broken)
                yield Told(done, len(jobs), broken)
            else:
                yield Told(done, len(jobs), ended.result)


def set_aside(zoo: Zoo, jobs: Sequence[Job], digest: str, ledger: Ledger, again: bool) -> None:
    """Move results of another method out of the way. UsageError unless ``again``."""
    old = [(j, r["method"]) for j in jobs if (r := zoo.read(j)) is not None and r["method"] != digest]
    if not old:
        return
    if not again:
        raise UsageError(
            f"{zoo.folder} holds {len(old)} results of method {old[0][1][:16]}, and the source is now method "
            f"{digest[:16]}: one table mixes no methods. Name another folder, or add --again to move those "
            "results aside and grow their organisms anew"
        )
    ledger.append("again", {"method": digest, "moved": {j.id: m for j, m in old}})
    for job, earlier in old:
        aside = (
            zoo.folder
            / "earlier"
            / f"{job.id}-{earlier[:16]}-{sha256_bytes(zoo.result(job).read_bytes())[:8]}"
        )
        aside.parent.mkdir(exist_ok=True)
        zoo.result(job).rename(aside.with_suffix(".json"))


def sweep(folder: Path) -> None:
    """Remove what a killed zoo left half-grown (call with the lock held: no other zoo grows here).

    The workers of a zoo that was killed just now end within a second, and are waited for; a process that
    lives on has got their number since and is none of ours, but its folder is left alone all the same.
    """
    sweep_temporaries(folder / "results")
    until = time.monotonic() + LINGER_S
    for path in (folder / "growing").glob("*"):
        pid = path.name.rpartition(".")[2]
        while pid.isdigit() and alive(int(pid)) and time.monotonic() < until:
            time.sleep(0.05)
        if not (pid.isdigit() and alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results(zoo: Zoo) -> list[dict[str, Any]]:
    """All results there are, in the plan's order. CheckpointError when they are of more than one method."""
    found = [r for j in zoo.jobs if (r := zoo.read(j)) is not None]
    methods = sorted({r["method"] for r in found})
    if len(methods) > 1:
        raise CheckpointError(
            f"{zoo.folder / 'results'} mixes results of methods {' and '.join(m[:16] for m in methods)}: "
            "one table describes one method; `glasshouse zoo run --again` grows the older ones anew"
        )
    return found


def scored(zoo: Zoo) -> Scored:
    """The zoo's numbers, from its result files alone. UsageError while there is none.

    Twins of every family are clean runs and are scored together.
    """
    found = results(zoo)
    if not found:
        raise UsageError(f"{zoo.folder} holds no result yet; `glasshouse zoo run {zoo.folder}` makes some")
    judged = {r["id"]: outcome(r) for r in found}
    rows = []
    for family in dict.fromkeys(j.family for j in zoo.jobs):
        own = [j for j in zoo.jobs if j.family == family and not j.twin]
        if own:
            done = [judged[j.id] for j in own if j.id in judged]
            rows.append(family_row(family, len(own), done, frozen=family in FROZEN))
    twins = twins_row([judged[j.id] for j in zoo.jobs if j.twin and j.id in judged])
    return Scored(tuple(rows), twins, about(zoo, found))


def about(zoo: Zoo, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the numbers rest on: method, time, size."""
    entries = read_entries(RunFolder(zoo.folder).ledger)
    grown = [r for r in found if r["status"] == "grown"]
    seconds = [float(r["seconds"]) for r in grown]
    jobs = [e["body"]["jobs"] for e in entries if e["kind"] == "slice"]
    return {
        "method": found[0]["method"],
        "planned": len(zoo.jobs),
        "done": len(found),
        "workers": jobs[-1] if jobs else 1,
        "hours": sum(seconds) / 3600 / (jobs[-1] if jobs else 1),
        "seconds_each": sum(seconds) / len(seconds) if seconds else 0.0,
        "parameters": grown[0].get("parameters") if grown else None,
        "frozen": [e["body"] for e in entries if e["kind"] == "frozen"],
        "again": sum(e["kind"] == "again" for e in entries),
    }
