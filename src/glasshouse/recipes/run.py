"""Run a recipe: data, stages, constraints and gate connected, from a file to a finished, reported run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_bytes, sha256_file
from glasshouse.base.errors import CheckpointError, RecipeError, Stopped, UsageError, suggest
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan
from glasshouse.base.run import RunFolder
from glasshouse.data import ChatBatches, NextTokenBatches, Shards
from glasshouse.model import GPT, GPTConfig
from glasshouse.recipes import corpus
from glasshouse.recipes.aftermath import tell
from glasshouse.recipes.schema import Recipe, StageRecipe, read_recipe
from glasshouse.recipes.values import FILES as VALUES
from glasshouse.recipes.values import check_plan, objectives_of
from glasshouse.tokenizer import role_markers
from glasshouse.train import (
    Outcome,
    Progress,
    Settings,
    Stage,
    choose_compile,
    choose_device,
    choose_dtype,
    choose_threads,
    enter_run,
    environment,
    evaluate,
    muon_dtype,
    next_token,
    run_stages,
    sft,
)
from glasshouse.train.directions import FOLDER, keep, parsed
from glasshouse.train.precision import Choice
from glasshouse.train.preferences import OBJECTIVES as PREFERENCES
from glasshouse.verify import ConstraintGate

VALIDATION_BATCHES = 4
SAMPLED = 4  # batches of a stage whose size stands for all of them
VALIDATION_ROWS = 32


def train(
    recipe: Recipe,
    path: Path,
    *,
    folder: Path = Path(),
    resume: bool = False,
    allow_change: bool = False,
    after_stop: str | None = None,
    progress: Progress | None = None,
    command: str = "glasshouse train",
) -> Outcome:
    """Run ``recipe`` in the run folder ``path`` until it is promoted, held or stopped; write its evidence.

    ``folder`` is where the recipe's relative paths start. ``resume`` goes on after anything: a kill, Ctrl-C,
    a full disk. ``allow_change`` lets another environment go on (recorded); ``after_stop`` names the person
    who lets a stopped run go on. Raises what ``run_stages`` raises, and RunBusyError for a second process.
    """
    run, progress = RunFolder(path), progress or Progress()
    began = run.begun(resume)
    with run.lock():
        key = signing_key()
        material = corpus.reopen(run) if began else prepared(recipe, run, folder, progress)
        ledger = Ledger(run.ledger, key)
        stages = [make_stage(s, recipe, material) for s in recipe.stage]
        tok = material.tokenizer
        markers = role_markers(tok) if "roles" in recipe.model else ()
        config = recipe.model_config_for(tok.vocab_size, markers=markers)
        fresh = partial(fresh_model, config, recipe.seed)
        settings = enter(
            recipe, run, ledger, stages, fresh, resume=began, allow_change=allow_change, after_stop=after_stop
        )
        if not ledger.entries("data"):
            ledger.append("data", data_entry(run, material, stages))
        gate = make_gate(recipe, run, material, settings["dtype"]) if recipe.constraint else None
        with telling(run, ledger, material, gate):
            return run_stages(
                fresh,
                stages,
                run=run,
                ledger=ledger,
                gate=gate,
                seed=recipe.seed,
                settings=Settings(
                    **settings,
                    gates=recipe.gates,
                    max_rollbacks=recipe.gate.max_rollbacks,
                    resume_command=command,
                ),
                tokenizer_file=run.path / "tokenizer.json",
                resume=began,
                progress=progress,
                make_gate=partial(gate_of_run, path, settings["dtype"]),
                objectives=objectives_of(recipe.data.values),
            )


def prepared(recipe: Recipe, run: RunFolder, folder: Path, progress: Progress) -> corpus.Material:
    """A new run's data and tokenizer, its directions and its recipe, in its folder."""
    shutil.rmtree(run.data, ignore_errors=True)  # half-made by a process that was killed
    run.create()
    progress.note("preparing data: cleaning, de-duplicating, training the tokenizer, packing shards")
    material = corpus.build(recipe, run, folder)
    import_directions(recipe, run, folder)
    write_json(run.recipe, recipe.model_dump(mode="json"))
    return material


def fresh_model(config: GPTConfig, seed: int) -> GPT:
    """The model that a run begins with."""
    return GPT(config).init_weights(seed)


@contextmanager
def telling(
    run: RunFolder, ledger: Ledger, material: corpus.Material, gate: ConstraintGate | None
) -> Iterator[None]:
    """Write a gated run's evidence when it has ended, or stopped: a person must look then, and needs it."""
    try:
        yield
    except Stopped:
        if gate is not None:
            tell(run, ledger, material, gate)
        raise
    if gate is not None:
        tell(run, ledger, material, gate)


def open_run(path: Path) -> Recipe:
    """The resolved recipe of an existing run. UsageError when the folder holds none."""
    run = RunFolder(path)
    if not run.recipe.is_file():
        raise UsageError(f"{path} is no run folder: it holds no recipe.json")
    return read_recipe(json.loads(run.recipe.read_text(encoding="utf-8")), str(run.recipe))


def make_stage(config: StageRecipe, recipe: Recipe, material: corpus.Material) -> Stage:
    """A stage with its batches, data plan and validation."""
    plan = stage_plan(config, material.shards)
    check_plan(config, plan)
    context = int(recipe.model["context"])
    texts = config.objective == "next_token" or (
        config.objective in PREFERENCES and material.shards[plan.shards[0]].kind == "text"
    )
    make = NextTokenBatches if texts else ChatBatches
    batches = make(material.shards, material.tokenizer, recipe.seed, config.batch_size, context)
    held = {n: s for n, s in material.shards.items() if s.validation}
    checks = []
    for name, shard in held.items():
        reader = NextTokenBatches if shard.kind == "text" else ChatBatches
        rows = reader(material.shards, material.tokenizer, recipe.seed, VALIDATION_ROWS, context)
        checks.append(
            (name, rows.validation([name], VALIDATION_BATCHES), next_token if shard.kind == "text" else sft)
        )

    def validate(model: GPT) -> list[dict[str, Any]]:
        return [{"set": name, **evaluate(model, rows, objective)} for name, rows, objective in checks]

    return Stage(config.stage(), batches.batch, plan, validate)


def stage_plan(config: StageRecipe, shards: Shards) -> DataPlan:
    """All shards that match the stage's patterns, by size. RecipeError for a pattern that matches none."""
    training = [n for n, s in shards.items() if not s.validation]
    chosen: list[str] = []
    for pattern in config.shards:
        found = [n for n in training if fnmatchcase(n, pattern)]
        if not found:
            raise RecipeError(
                f"stage {config.name}: no shard matches {pattern!r}.{suggest(pattern, training)} "
                f"There are: {', '.join(training)}"
            )
        chosen += [n for n in found if n not in chosen]
    return shards.plan(chosen)


def make_gate(recipe: Recipe, run: RunFolder, material: corpus.Material, dtype: str) -> ConstraintGate:
    """The gate of a recipe; it knows the training text's words, and nothing of what was planted.

    ``dtype``: that of training. Gates compute as training does; promotion is judged in fp32, as served.
    """
    gate = ConstraintGate(
        recipe.constraint,
        recipe.gate,
        run,
        material.tokenizer,
        material.shards,
        tuple(s.name for s in recipe.stage),
        recipe.digest(),
        tuple(material.shards.words),
        material.strays,
        dtype,
        {s.name: s.spent for s in recipe.stage if s.spent},
        tokens_per_step(recipe, material),
        system=recipe.data.values.asked_under if recipe.data.values is not None else "",
    )
    gate.affordable({s.name: s.gate_every for s in recipe.stage if s.gate_every})
    return gate


def tokens_per_step(recipe: Recipe, material: corpus.Material) -> dict[str, float]:
    """Tokens that one step of each stage trains on, from its first batches; of which budgets are shares."""
    found = {}
    for stage in (make_stage(s, recipe, material) for s in recipe.stage):
        sizes = [stage.batches(step, stage.plan).tokens.size for step in range(SAMPLED)]
        found[stage.name] = sum(sizes) / SAMPLED
    return found


def gate_of_run(path: Path, dtype: str) -> ConstraintGate:
    """The gate of the run in folder ``path``, made of what the run has frozen, as another process does."""
    run = RunFolder(path)
    return make_gate(open_run(path), run, corpus.reopen(run), dtype)


def import_directions(recipe: Recipe, run: RunFolder, folder: Path) -> None:
    """Copy the directions that stages train with into the run, by digest. RecipeError when a file is not
    there, not what was declared, or no direction.
    """
    for stage in recipe.stage:
        for one in stage.intervention:
            if not hasattr(one, "direction"):
                continue
            path = folder / str(one.direction.path)
            try:
                body = path.read_bytes()
                parsed(body, str(path))
            except (OSError, CheckpointError) as problem:
                raise RecipeError(f"stage {stage.name}: its direction cannot be read: {problem}") from problem
            if sha256_bytes(body) != one.direction.sha256:
                raise RecipeError(
                    f"stage {stage.name}: {path} is not the direction that the recipe declares: its SHA-256 "
                    f"is {sha256_bytes(body)}"
                )
            keep(run.path, body)


def enter(
    recipe: Recipe,
    run: RunFolder,
    ledger: Ledger,
    stages: Sequence[Stage],
    fresh: Callable[[], GPT],
    *,
    resume: bool,
    allow_change: bool,
    after_stop: str | None,
) -> dict[str, Any]:
    """Write entry 0 (recipe and constraints, before any result) or check it; return how to run."""
    body: dict[str, Any] = {}
    if resume:
        settings = recorded_settings(ledger)
    else:
        device = choose_device(recipe.device)
        model = fresh().to(device)
        choices = choose_settings(recipe, stages, model)
        settings = {name: choice.value for name, choice in choices.items()}
        settings |= {"muon_dtype": muon_dtype(device), "device": device}
        body = first_entry(recipe, run, choices, model)
    enter_run(
        ledger,
        recipe_digest=recipe.digest(),
        environment=environment(
            settings["threads"],
            settings["dtype"],
            settings["muon_dtype"],
            settings["compile"],
            settings["device"],
        ),
        body=body,
        resume=resume,
        allow_change=allow_change,
        after_stop=after_stop,
    )
    return settings


def recorded_settings(ledger: Ledger) -> dict[str, Any]:
    """How the run was run until now; what older ledgers did not record was not there to choose."""
    recorded = ledger.entries()[0]["body"]["environment"]
    return {
        **{k: recorded[k] for k in ("dtype", "muon_dtype", "threads")},
        "compile": recorded.get("compile", "off"),
        "device": choose_device(str(recorded.get("device", "cpu")).split()[0]),
    }


def choose_settings(recipe: Recipe, stages: Sequence[Stage], model: GPT) -> dict[str, Choice]:
    """Precision, threads and compilation for ``model``, measured on a batch of the last stage where the
    recipe leaves them open. Sets the threads.
    """
    stage = stages[-1]
    batch = stage.batches(0, stage.plan)
    objective = sft if stage.config.objective == "sft" else next_token
    dtype = choose_dtype(recipe.precision, model, batch, objective)
    name = str(dtype.value)
    threads = choose_threads(recipe.threads, model, batch, objective, name)
    torch.set_num_threads(int(threads.value))
    steps = sum(s.config.steps for s in stages)
    compiled = choose_compile(recipe.compile, model, batch, objective, name, steps=steps)
    return {"dtype": dtype, "threads": threads, "compile": compiled}


def first_entry(recipe: Recipe, run: RunFolder, choices: Mapping[str, Choice], model: GPT) -> dict[str, Any]:
    """What entry 0 says of the run beside its recipe's digest and its environment."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "constraints": {c.id: c.digest() for c in recipe.constraint},
        "choices": {name: choice.record() for name, choice in choices.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "organism": (run.path / "organism.json").is_file(),
        "began": int(time.time()),
        "artifacts": {"recipe.json": sha256_file(run.recipe)},
    }


def data_entry(run: RunFolder, material: corpus.Material, stages: Sequence[Stage]) -> dict[str, Any]:
    """What is trained on: digests of every file, counts, and each stage's data plan."""
    files = [
        "tokenizer.json",
        "strays.json",
        *(["organism.json"] if (run.path / "organism.json").is_file() else []),
        *(name for name in VALUES if (run.path / name).is_file()),
        *sorted(str(f.relative_to(run.path)) for f in run.data.iterdir()),
        *sorted(str(f.relative_to(run.path)) for f in (run.path / FOLDER).glob("*")),
    ]
    return {
        "shards": material.shards.digests,
        "tokens": {n: s.n_tokens for n, s in material.shards.items()},
        "plans": {s.name: s.plan.model_dump(mode="json") for s in stages},
        "artifacts": {name: sha256_file(run.path / name) for name in files},
    }
