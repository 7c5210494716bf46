"""Text for the loss benchmarks, one evaluator for every contestant, and a whole run of ours in a function.

Both tasks are character-level with nanoGPT's own vocabulary (the sorted characters of the text) and split:
the first 90 % train, the last 10 % validate. Every contestant is scored by the same windows of 64 characters,
each position given only the characters before it in its window.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glasshouse.base.batch import Batch
from glasshouse.base.digest import digest_of, sha256_bytes
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import (
    Settings,
    Stage,
    StageConfig,
    choose_dtype,
    choose_threads,
    enter_run,
    environment,
    evaluate,
    load_weights,
    muon_dtype,
    run_stages,
)

WINDOW = 64  # the README recipe's block_size: what both contestants are scored at
EVALUATED = 4096  # windows of the books' held-out text; Shakespeare's has 1,742 and all are used


@dataclass(frozen=True)
class Task:
    """A text as ids of characters, with a training and a held-out part."""

    name: str
    text: str

    @cached_property
    def symbols(self) -> list[str]:
        """The vocabulary, sorted, as nanoGPT's prepare.py makes it."""
        return sorted(set(self.text))

    @cached_property
    def ids(self) -> np.ndarray:
        """The whole text, uint16."""
        points = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        return np.searchsorted(np.array([ord(c) for c in self.symbols]), points).astype(np.uint16)

    @property
    def cut(self) -> int:
        """Where the held-out part begins."""
        return int(len(self.text) * 0.9)

    @cached_property
    def symbol_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every symbol."""
        return np.array([len(c.encode("utf-8")) for c in self.symbols])

    def windows(self, starts: np.ndarray, length: int) -> Batch:
        """The windows [n, length] that begin at ``starts``, with the characters that follow as targets."""
        rows = self.ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        n_bytes = int(self.symbol_bytes[targets].sum())
        return Batch(tokens, targets, np.ones(tokens.shape, dtype=np.float32), (self.name,), n_bytes)

    def held_out(self, most: int = EVALUATED) -> list[Batch]:
        """Windows spread evenly over the held-out text, none overlapping, in batches of 128."""
        starts = np.arange(self.cut, len(self.ids) - WINDOW - 1, WINDOW)
        if len(starts) > most:
            starts = starts[np.arange(most) * len(starts) // most]
        return [self.windows(starts[i : i + 128], WINDOW) for i in range(0, len(starts), 128)]

    def batches(self, seed: int, rows: int, length: int) -> Callable[[int, DataPlan], Batch]:
        """Random windows of the training part, as nanoGPT's get_batch draws them, pure in the step."""

        def batch(step: int, plan: DataPlan) -> Batch:
            starts = generator("windows", self.name, seed, step).integers(self.cut - length - 1, size=rows)
            return self.windows(starts, length)

        return batch

    @property
    def plan(self) -> DataPlan:
        """One shard: the training text."""
        phase = Phase(from_step=0, weights={self.name: 1.0})
        return DataPlan(phases=(phase,), digests={self.name: sha256_bytes(self.ids[: self.cut].tobytes())})


def shakespeare(data: Path) -> Task:
    """Tiny Shakespeare, ``data``/tinyshakespeare/input.txt: 1.1 million characters, 65 symbols."""
    return Task("shakespeare", (data / "tinyshakespeare" / "input.txt").read_text("utf-8"))


def books(data: Path) -> Task:
    """112 books, ``data``/books/*.jsonl.gz, one after the other: 79 million characters, 167 symbols; the last
    ones are held out.
    """
    texts = []
    for file in sorted((data / "books").glob("books-*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return Task("books", "\n\n".join(texts))


TASKS = {"shakespeare": shakespeare, "books": books}


@dataclass(frozen=True)
class Recipe:
    """What one run of ours is made of; ``stage`` and ``model`` hold the changes from the defaults."""

    model: Mapping[str, Any]
    stage: Mapping[str, Any]
    length: int = WINDOW
    precision: str = "auto"
    threads: int | Literal["auto"] = "auto"
    change_init: Callable[[GPT, int], None] | None = None


def train_ours(recipe: Recipe, task: Task, seed: int) -> dict[str, Any]:
    """One whole run of ours on a task, scored like every contestant."""
    config = GPTConfig(
        **{"vocab_size": len(task.symbols), "context": recipe.length, "tied": True, **recipe.model}
    )
    stage_config = StageConfig(**{"name": "pretrain", **recipe.stage})
    stage = Stage(stage_config, task.batches(seed, stage_config.batch_size, recipe.length), task.plan)
    found, model = run_stage(config, stage, seed, recipe.precision, recipe.threads, recipe.change_init)
    scored = evaluate(model, task.held_out())
    tokens = stage_config.steps * stage_config.batch_size * recipe.length
    where = {"contestant": "glasshouse", "task": task.name, "seed": seed, "tokens": tokens}
    return where | found | score(scored["loss"], scored["n_bytes"], scored["targets"])


def run_stage(
    config: GPTConfig,
    stage: Stage,
    seed: int,
    precision: str = "auto",
    threads: int | Literal["auto"] = "auto",
    change_init: Callable[[GPT, int], None] | None = None,
) -> tuple[dict[str, Any], GPT]:
    """One whole run through `run_stages`: what was measured, and the model as its last checkpoint holds it.

    ``seconds`` is wall time from the ready text to the saved final checkpoint: initialisation, the choice of
    precision and threads, compilation if there is any, every step, both checkpoints.
    """

    def fresh() -> GPT:
        model = GPT(config).init_weights(seed)
        if change_init is not None:
            change_init(model, seed)
        return model

    began = time.perf_counter()
    first = stage.batches(0, stage.plan)
    dtype = choose_dtype(precision, fresh(), first)
    chosen = choose_threads(threads, fresh(), first, dtype=str(dtype.value))
    settings = Settings(dtype=str(dtype.value), muon_dtype=muon_dtype(), threads=int(chosen.value))
    choosing = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="glasshouse-loss-") as folder:
        run = RunFolder(Path(folder)).create()
        ledger = Ledger(run.ledger, signing_key())
        now = environment(settings.threads, settings.dtype, settings.muon_dtype)
        digest = digest_of([config.digest(), stage.config.digest()])
        enter_run(ledger, recipe_digest=digest, environment=now)
        outcome = run_stages(fresh, [stage], run=run, ledger=ledger, seed=seed, settings=settings)
        seconds = time.perf_counter() - began
        model = load_weights(outcome.checkpoint)
        rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    steps = [row["seconds_per_step"] for row in rows if row["kind"] == "train"]
    return {
        "seconds": round(seconds, 3),
        "seconds_choosing": round(choosing, 3),
        "seconds_per_step": round(float(np.median(steps)), 5),
        "steps": stage.config.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": settings.dtype,
        "threads": settings.threads,
    }, model


def score(
    nats: float | int | None, n_bytes: float | int | None, targets: float | int | None
) -> dict[str, Any]:
    """Loss in nats a token and in bits a byte."""
    assert nats is not None and n_bytes and targets
    return {"loss": round(float(nats), 5), "bpb": round(float(nats) * targets / n_bytes / math.log(2), 5)}
