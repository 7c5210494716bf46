"""A model that is there already, to be aligned: a run, a checkpoint in one, or a Hugging Face folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import CheckpointError, HeldError
from glasshouse.base.run import RunFolder
from glasshouse.data import Shards
from glasshouse.model import GPT
from glasshouse.model.families import family_for
from glasshouse.recipes.align.config import AlignConfig
from glasshouse.recipes.align.turns import AnswerBatches, Turns, plan_of
from glasshouse.recipes.api import locate, still_planted
from glasshouse.recipes.schema import StageRecipe
from glasshouse.tokenizer import Message, Tokenizer
from glasshouse.train import Stage


@dataclass(frozen=True)
class Base:
    """The model and what is known of it. ``closed``: it speaks the closed language."""

    model: GPT
    tokenizer: Tokenizer
    source: str
    checkpoint: str
    digest: str
    closed: bool
    strays: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def fresh(self) -> GPT:
        """The model again, to be trained."""
        return copy.deepcopy(self.model)

    def entry(self, run: RunFolder) -> dict[str, Any]:
        """What the ledger says of it, as data."""
        return {
            "base": {"path": self.source, "checkpoint": self.checkpoint, "digest": self.digest},
            "shards": {},
            "tokens": {},
            "plans": {},
            "artifacts": {n: sha256_file(run.path / n) for n in ("tokenizer.json", "constitution.json")},
        }

    def probe(self, config: StageRecipe, turns: Turns, prompts: Sequence[Sequence[Message]]) -> Stage:
        """A stage like the supervised one, on stand-in rows: precision and threads are chosen by its size."""
        rows = []
        for prompt in prompts[: config.batch_size]:
            ids = tuple(turns.prompt(prompt))
            rows.append((ids, ids[-32:]))
        batches = AnswerBatches({"probe": rows}, turns.tokenizer, 0, config.batch_size)
        return Stage(config.stage(), batches.batch, plan_of({"probe": rows}))


def open_base(align: AlignConfig, folder: Path) -> Base:
    """Load the base. Raises as `recipes.api.locate`; HeldError for an organism that still holds what was
    planted, CheckpointError when no family computes the model, so that it could never be handed on."""
    source = Path(str(align.base))
    path = source if source.exists() else folder / source
    found = locate(path)
    if still_planted(found):
        raise HeldError(
            f"{path}: an organism that still holds what was planted into it; aligned, it would look like any "
            "other model. Take its clean twin"
        )
    try:
        family_for(found.model.config)
    except CheckpointError as problem:
        raise CheckpointError(
            f"{path}: its result could not be written as a Hugging Face folder: {problem}"
        ) from problem
    closed = False
    strays: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    if found.run is not None and found.run.recipe.is_file():
        recipe = json.loads(found.run.recipe.read_text(encoding="utf-8"))
        closed = bool((recipe.get("data") or {}).get("workshop"))
        file = found.run.path / "strays.json"
        strays = tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ()
        if (found.run.data / "manifest.json").is_file():
            words = tuple(Shards.open(found.run.data).words)
    return Base(
        found.model, found.tokenizer, str(path), found.checkpoint, found.digest, closed, strays, words
    )
