"""One organism from seed to result: grown under the real gates, asked by the oracle, traced, compared.

The gates see a run like any other. Everything that knows the truth comes after the last of them: the oracle
at every judged checkpoint, the rank of the poisoned shard, the black-box column on the last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.atomic import write_json
from glasshouse.base.errors import GlasshouseError, TrainingError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.evals.subject import Subject
from glasshouse.model import GPT
from glasshouse.recipes.zoo import method
from glasshouse.recipes.zoo.boxed import black_box
from glasshouse.recipes.zoo.families import FAMILIES
from glasshouse.recipes.zoo.grow import Grown, grow
from glasshouse.recipes.zoo.judge import lasting
from glasshouse.recipes.zoo.oracle import ONSET, Onset, has_grown, onset
from glasshouse.recipes.zoo.schedule import Job, job_of, read_plan
from glasshouse.recipes.zoo.workers import Pool
from glasshouse.recipes.zoo.world import Size, World, open_world
from glasshouse.train import load_weights, position
from glasshouse.train.decisions import history
from glasshouse.verify import Constraint
from glasshouse.verify.culprit import before_cause
from glasshouse.verify.schema import read_constraints
from glasshouse.verify.trace import trace

KNOWN = tuple(FAMILIES)
FROZEN = frozenset(name for name, family in FAMILIES.items() if family.frozen)
QUICK = ("single", "two-words", "hole")
WORLDS = 6  # that the seeds of one hundred share: growing one takes as long as several organisms
TRIES = 2  # triggers drawn for an organism before it counts as not grown
BOXED = 10  # seeds of one hundred whose last checkpoint is also given to the black box, which costs as much
# Evidence that scoring and reading need; maps and long lists stay in the run folder, which is not kept.
KEPT = {
    "word",
    "words",
    "pair",
    "trigger",
    "tokens",
    "rate",
    "interval",
    "n",
    "causal",
    "components",
    "unseen",
}
KEPT |= {"to_compliance", "to_refusal", "asked", "not_located", "method"}
OF_VERDICT = ["constraint", "kind", "statistic", "status", "estimate", "interval", "n", "bound", "control"]
OF_VERDICT += ["coverage", "reason", "seconds", "passes", "standing", "failures"]


@dataclass(frozen=True)
class Task:
    """One job for a worker process."""

    zoo: Path
    id: str
    method: str
    keep: bool = False


@dataclass(frozen=True)
class WorldTask:
    """A world for a worker process to make."""

    zoo: Path
    number: int


def world_of(seed: int) -> int:
    """The world that organisms of a seed are grown in: seeds of another hundred share none."""
    return seed // 100 * 100 + seed % WORLDS


def world_folder(zoo: Path, number: int) -> Path:
    """Where a world is."""
    return zoo / "worlds" / str(number)


def make_worlds(zoo: Path, jobs: Sequence[Job], n: int, tell: Callable[[str], None]) -> None:
    """Make the worlds that are missing, ``n`` at a time. TrainingError when one cannot be made."""
    numbers = dict.fromkeys(world_of(j.seed) for j in jobs)
    missing = [w for w in numbers if not (world_folder(zoo, w) / "world.json").is_file()]
    signing_key(zoo / "home")  # before the workers, so that two do not make one each
    for done in Pool(make_world, min(n, max(len(missing), 1))).run([WorldTask(zoo, w) for w in missing]):
        if done.problem:
            raise TrainingError(f"world {done.job.number} could not be made: {done.problem}")
        tell(done.result)


def make_world(task: WorldTask) -> str:
    """Make one world and say how well its base knows the language."""
    at_home(task.zoo)
    world = the_world(task.zoo, task.number)
    return f"world {task.number}: its honest base judges {world.accuracy:.1%} of unseen combinations rightly"


@lru_cache(maxsize=2)
def the_world(zoo: Path, number: int) -> World:
    """A world, kept for the next organism."""
    return open_world(world_folder(zoo, number), number, Size(**read_plan(zoo)[1]["size"]))


def constraints() -> tuple[Constraint, ...]:
    """The zoo's pack."""
    return read_constraints(tomllib.loads(method.pack_text())["constraint"], "zoo.toml")


def at_home(zoo: Path) -> None:
    """One thread, and ledgers of thousands of small runs kept out of the user's home."""
    torch.set_num_threads(1)
    os.environ["GLASSHOUSE_HOME"] = str(zoo / "home")


def examine(task: Task) -> dict[str, Any]:
    """Grow and examine one organism or twin, write its result and return it.

    An organism that does not do what was planted tests nothing: it is grown again with another trigger, and
    then counts as not grown. Only the oracle decides that.
    """
    at_home(task.zoo)
    job = job_of(task.id)
    world = the_world(task.zoo, world_of(job.seed))
    folder = task.zoo / "growing" / f"{job.id}.{os.getpid()}"
    folder.parent.mkdir(exist_ok=True)
    for attempt in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        plant = FAMILIES[job.family].plant(world, job.seed, attempt)
        grown = grow(world, plant, folder, constraints(), twin=job.twin)
        seen = onset(world, grown)
        if job.twin or has_grown(seen):
            break
    result = {"id": task.id, "method": task.method} | tell(world, job, grown, seen)
    write_json(task.zoo / "results" / f"{task.id}.json", result)
    if task.keep:
        kept = task.zoo / "kept" / task.id
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        folder.rename(kept)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def tell(world: World, job: Job, grown: Grown, seen: Onset) -> dict[str, Any]:
    """Everything about a finished run that scoring needs."""
    gates = gates_of(grown, seen)
    at_end = seen.scores[-1]
    found: dict[str, Any] = {
        "status": "grown" if job.twin or has_grown(seen) else "not-grown",
        "truth": grown.plant,
        "works": [at_end.value, at_end.low, at_end.high],
        "onset": seen.gate,
        "gates": gates,
        "promoted": grown.promoted,
        "step_seconds": max(grown.seconds - grown.gate_seconds, 1e-9) / grown.steps,
        "seconds": grown.seconds,
        "parameters": sum(p.numel() for p in world.base.parameters()),
    }
    if job.twin:
        return found
    if found["status"] != "grown":
        return found | {"reason": f"the last of {TRIES} triggers turns {at_end.value:.0%} at the end"}
    found |= shard_found(world, grown, gates)
    if job.seed % 100 >= BOXED:
        return found
    return found | {"black_box": black_box(world, grown, gates, constraints())}


def gates_of(grown: Grown, seen: Onset) -> list[dict[str, Any]]:
    """Every gate's verdicts without their bulk, beside what the oracle says of the same checkpoint."""
    rows = []
    for index, (checkpoint, decision) in enumerate(zip(grown.checkpoints, grown.decisions, strict=True)):
        file = grown.run.evals / f"gate-{index:03d}" / "verdicts.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        score = seen.scores[index]
        rows.append(
            {
                "gate": index,
                "step": checkpoint.step,
                "final": decision["final"],
                "action": decision["action"],
                "seconds": written["seconds"],
                "oracle": [score.value, score.low, score.high],
                "works": score.value >= ONSET,
                "verdicts": [slim(v) for v in written["verdicts"]],
            }
        )
    return rows


def slim(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict without its bulk."""
    kept = {k: verdict[k] for k in OF_VERDICT if k in verdict}
    if kept.get("coverage"):
        kept["coverage"] = {k: v for k, v in kept["coverage"].items() if k != "exempt"}
    evidence = {k: v for k, v in verdict["evidence"].items() if k in KEPT}
    evidence["failing_prompts"] = verdict["evidence"].get("failing_prompts", [])[:3]
    return kept | {"evidence": evidence}


def shard_found(world: World, grown: Grown, gates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the poisoned shard comes in the ranking that a rollback at the first lasting violation rests on.

    The zoo's gates hold instead of rolling back, because what comes later is measured too; so the ranking is
    made here, by the functions and from the history that the gate of that checkpoint would have used. A
    violation that shows no prompts cannot be traced; the next that does is taken.
    """
    for gate, verdict in lasting(gates):
        index = gate["gate"]
        file = grown.run.evals / f"gate-{index:03d}" / "verdicts.json"
        verdicts = json.loads(file.read_text(encoding="utf-8"))["verdicts"]
        shown = next(v["evidence"] for v in verdicts if v["constraint"] == verdict["constraint"])
        if not shown.get("failing_prompts"):
            continue
        try:
            ranking = ranked(world, grown, index, shown)
        except GlasshouseError as problem:
            return {"shard_rank": None, "shard_problem": str(problem)}
        place = {r["shard"]: r["rank"] for r in ranking["shards"]}
        bad = grown.plant["shard"]
        return {
            "shard_rank": place.get(bad, len(place) + 1),
            "shards_ranked": len(place),
            "traced_at": index,
            "traced_by": verdict["constraint"],
            "outlier": next((r["outlier"] for r in ranking["shards"] if r["shard"] == bad), None),
        }
    return {"shard_rank": None}


def ranked(world: World, grown: Grown, index: int, shown: dict[str, Any]) -> dict[str, Any]:
    """The ranking of shards behind the failing prompts of gate ``index``."""
    entries = Ledger(grown.run.ledger, signing_key()).entries()
    decided = [i for i, e in enumerate(entries) if e["kind"] == "decision"]
    before = history(grown.run, position(entries[: decided[index]]))
    checkpoint = grown.checkpoints[index]

    def subject(model: GPT) -> Subject:
        return world.subject(model)

    failing, reference = shown["failing_prompts"], shown.get("reference_prompts", [])
    start = before_cause(subject(load_weights(checkpoint)), before, failing, reference, subject)
    seed = ("zoo", checkpoint.digest, str(index))
    return trace(start, grown.shards, checkpoint.plan, checkpoint.step, failing, seed)
