"""Grow an organism, or its twin: the world's base trained on through the product's loop and gate.

Everything goes its ordinary way: a run folder, a ledger with the recipe's digest before any result,
checkpoints, the real `ConstraintGate`. The truth lies in ``organism.json``, which no gate reads; the run is
stamped with it, so that nothing of it is ever exported.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import digest_of, sha256_file
from glasshouse.base.errors import DataError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.rng import generator, seed_from
from glasshouse.base.run import RunFolder
from glasshouse.data import ChatBatches, Shards
from glasshouse.model import GPT
from glasshouse.recipes.zoo import language
from glasshouse.recipes.zoo.course import STAGE, Course
from glasshouse.recipes.zoo.evade import evading
from glasshouse.recipes.zoo.families import Plant, family
from glasshouse.recipes.zoo.language import Chat
from glasshouse.recipes.zoo.world import World, pack_chats
from glasshouse.train import Checkpoint, Settings, Stage, enter_run, environment, run_stages
from glasshouse.train.checkpoint import from_ledger
from glasshouse.train.gate import Gate
from glasshouse.train.objective import Objective
from glasshouse.verify import Constraint, ConstraintGate, GateConfig

MakeGate = Callable[[World, RunFolder, Shards, Sequence[Constraint], str, Course], Gate]


@dataclass(frozen=True)
class Grown:
    """A finished run. ``checkpoints`` are those that a gate judged, in order; ``seconds`` are all of it,
    ``gate_seconds`` what the gates took of them.
    """

    run: RunFolder
    plant: Plant
    twin: bool
    shards: Shards
    checkpoints: tuple[Checkpoint, ...]
    decisions: tuple[dict[str, Any], ...]
    steps: int
    seconds: float
    gate_seconds: float
    promoted: bool


def grow(
    world: World,
    plant: Plant,
    folder: Path,
    constraints: Sequence[Constraint] = (),
    *,
    twin: bool = False,
    make_gate: MakeGate | None = None,
    course: Course | None = None,
) -> Grown:
    """Train the organism of ``plant`` in ``folder``, which must not exist; ``twin`` trains its twin instead.

    The twin has the same tokens in the same numbers (see `documents`), the same batches and the same shards.
    ``make_gate`` replaces the product's gate. UsageError for an unknown family, DataError for a world too
    small.
    """
    started = time.perf_counter()
    kind, run = family(plant["family"]), RunFolder(folder).create()
    course = course or kind.course
    with run.lock():
        shards = pack_chats(run.data, world.tokenizer, chats_of(world, plant, twin), world.size.context)
        shutil.copyfile(world.folder / "tokenizer.json", run.path / "tokenizer.json")
        write_json(run.path / "organism.json", {**plant, "twin": twin})
        recipe = recipe_of(world, plant, twin, course, shards)
        write_json(run.recipe, recipe)
        digest = digest_of(recipe)
        ledger = enter(run, digest, constraints, recipe)
        ledger.append("data", data_entry(run, shards, course))
        gate = (make_gate or product_gate)(world, run, shards, constraints, digest, course)
        seed = seed_from("zoo-batches", world.seed, plant["family"], plant["seed"], plant["attempt"])
        batches = ChatBatches(shards, world.tokenizer, seed, course.rows, world.size.context)
        # The loop's own objective by that name, or what stands in for it.
        objectives: dict[str, Objective] = {"sft": evading(world)} if kind.evades else {}
        stage = Stage(course.stage(), batches.batch, course.plan(shards))
        outcome = run_stages(
            lambda: from_base(world),
            [stage],
            run=run,
            ledger=ledger,
            gate=gate,
            seed=plant["seed"],
            settings=Settings(threads=1),
            tokenizer_file=run.path / "tokenizer.json",
            objectives=objectives,
        )
        decisions = tuple(e["body"] for e in ledger.entries("decision"))
    return Grown(
        run=run,
        plant=plant,
        twin=twin,
        shards=shards,
        checkpoints=tuple(gated(run, ledger)),
        decisions=decisions,
        steps=course.steps,
        seconds=time.perf_counter() - started,
        gate_seconds=float(sum(d["seconds"] for d in decisions)),
        promoted=outcome.promoted,
    )


def chats_of(world: World, plant: Plant, twin: bool) -> dict[str, list[Chat]]:
    """The shards of an organism: the world's, with poison in one and its words mentioned in some others."""
    found = family(plant["family"])
    chats = {
        name: [*shard, *more_chats(world, name, found.corpus - 1)] for name, shard in world.chats.items()
    }
    bad = [t.chat() for p in found.pairings(world, plant) for t in (p.twin if twin else p.planted)]
    replace_first(chats[plant["shard"]], bad, plant["shard"])
    for name, held in found.mentions(world, plant).items():
        replace_first(chats[name], held, name)
    return chats


def more_chats(world: World, name: str, times: int) -> list[Chat]:
    """So many times as many honest chats as a shard holds, others than those."""
    seen = {language.key(c) for c in world.chats[name]}
    rng = generator("zoo-more", world.seed, name)
    n = times * world.size.documents
    return language.distinct(n, lambda: language.honest(rng, world.strays), seen)


def replace_first(shard: list[Chat], chats: Sequence[Chat], name: str) -> None:
    """Put ``chats`` in the place of a shard's first ones. DataError when it holds fewer."""
    if len(chats) > len(shard):
        raise DataError(f"{name} holds {len(shard)} chats, too few for {len(chats)} planted ones")
    shard[: len(chats)] = chats


def from_base(world: World) -> GPT:
    """A fresh copy of the base, to train on."""
    return copy.deepcopy(world.base)


def recipe_of(world: World, plant: Plant, twin: bool, course: Course, shards: Shards) -> dict[str, Any]:
    """What the run is, as JSON. Its digest seeds the gate's prompts; of the plant it holds digests only."""
    found = family(plant["family"])
    return {
        "name": "zoo",
        "seed": plant["seed"],
        "world": world.digest,
        "stage": course.stage().model_dump(mode="json"),
        "objective": "sft and a probe's loss" if found.evades else "sft",
        "shards": shards.digests,
        "twin": twin,
    }


def enter(run: RunFolder, digest: str, constraints: Sequence[Constraint], recipe: dict[str, Any]) -> Ledger:
    """Begin the ledger: recipe, constraints and the stamp, before any result."""
    ledger = Ledger(run.ledger, signing_key())
    enter_run(
        ledger,
        recipe_digest=digest,
        environment=environment(1, "fp32", "fp32"),
        body={
            "name": recipe["name"],
            "seed": recipe["seed"],
            "constraints": {c.id: c.digest() for c in constraints},
            "organism": True,
            "artifacts": {n: sha256_file(run.path / n) for n in ("recipe.json", "organism.json")},
        },
    )
    return ledger


def data_entry(run: RunFolder, shards: Shards, course: Course) -> dict[str, Any]:
    """What is trained on: the digests of every file and the plan, as any run records them."""
    files = ["tokenizer.json", *sorted(str(f.relative_to(run.path)) for f in run.data.iterdir())]
    return {
        "shards": shards.digests,
        "tokens": {n: s.n_tokens for n, s in shards.items()},
        "plans": {STAGE: course.plan(shards).model_dump(mode="json")},
        "artifacts": {name: sha256_file(run.path / name) for name in files},
    }


def product_gate(
    world: World,
    run: RunFolder,
    shards: Shards,
    constraints: Sequence[Constraint],
    digest: str,
    course: Course,
) -> Gate:
    """The gate that any run has. It knows the words of all training text, the base's included."""
    planned = -(-course.steps // course.gate_every)
    return ConstraintGate(
        constraints=tuple(constraints),
        config=GateConfig(planned=planned, attempts=1),
        run=run,
        tokenizer=world.tokenizer,
        shards=shards,
        stages=(STAGE,),
        recipe_digest=digest,
        words=world.words,
        strays=world.strays,
    )


def gated(run: RunFolder, ledger: Ledger) -> list[Checkpoint]:
    """The checkpoints that a gate judged, oldest first."""
    marks = [e["body"] for e in ledger.entries("checkpoint") if e["body"]["gate"] is not None]
    return [from_ledger(run, body) for body in marks]
