"""What all phases of a run share, and where the run stands between them.

A phase that makes rows is closed by a ledger entry of kind "phase" with the digests of its files; a phase
that trains is closed by its stage's last checkpoint. Rows are durable one by one and known by their content,
so a phase that was killed is simply begun again: what is there is not made twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glasshouse.align.constitution import Constitution
from glasshouse.align.local import LocalEngine
from glasshouse.base.crash import crash_point
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import CheckpointError, DataError
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.evals.chat import ChatFormat
from glasshouse.model import GPT
from glasshouse.recipes.align.config import OF_POLICY, REVISED, AlignConfig
from glasshouse.recipes.align.prompts import Prompts, held_out_prompts, prompts_for
from glasshouse.recipes.align.turns import Turns
from glasshouse.recipes.schema import Recipe, StageRecipe
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Checkpoint, Progress, load_weights, position
from glasshouse.train.checkpoint import from_ledger

HELD_OUT = 24  # prompts that a run of RL in the closed language is watched with


@dataclass
class Work:
    """One run of the phases. ``start``: the model that they begin with when the recipe names one."""

    recipe: Recipe
    constitution: Constitution
    run: RunFolder
    ledger: Ledger
    folder: Path
    tokenizer: Tokenizer
    chat: ChatFormat
    strays: tuple[str, ...]
    words: tuple[str, ...]
    closed: bool  # whether the model speaks the closed language
    progress: Progress
    command: str
    settings: dict[str, Any]
    start: GPT | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def align(self) -> AlignConfig:
        """The section `[align]`."""
        assert self.recipe.align is not None
        return self.recipe.align

    @property
    def home(self) -> Path:
        """The folder of everything the phases write beside checkpoints."""
        return self.run.path / "align"

    @property
    def grown(self) -> tuple[StageRecipe, ...]:
        """The stages before the phases."""
        names = [s.name for s in self.recipe.stage]
        return self.recipe.stage[: names.index(self.supervised.name)]

    @property
    def supervised(self) -> StageRecipe:
        """The stage on revisions."""
        return next(s for s in self.recipe.stage if REVISED[0] in s.shards)

    @property
    def policy(self) -> StageRecipe | None:
        """The stage of RL or DPO; None: the supervised phase alone."""
        return next((s for s in self.recipe.stage if s.objective in OF_POLICY), None)

    @cached_property
    def prompts(self) -> Prompts:
        """What is asked in the phases."""
        return prompts_for(self.align, self.folder, self.recipe.seed, self.strays, self.closed)

    @cached_property
    def watched(self) -> list[Any]:
        """Prompts of the closed language that nothing trains on."""
        return list(held_out_prompts(self.recipe.seed, self.strays, HELD_OUT)) if self.closed else []

    # -- where the run stands ----------------------------------------------------------------------------

    def phase(self, name: str) -> dict[str, Any] | None:
        """What the ledger says of a closed phase. CheckpointError when a file of it was changed since."""
        body = next((e["body"] for e in self.ledger.entries("phase") if e["body"]["phase"] == name), None)
        for file, expected in (body or {}).get("artifacts", {}).items():
            path = self.run.path / file
            if not path.is_file() or sha256_file(path) != expected:
                raise CheckpointError(
                    f"{path} is not what the phase '{name}' left (the ledger has its digest): restore it, or "
                    "start a new run"
                )
        return body

    def close(self, name: str, files: Sequence[Path], **numbers: Any) -> None:
        """Ledger that a phase is done, with its files' digests and ``numbers``."""
        artifacts = {str(f.relative_to(self.run.path)): sha256_file(f) for f in files}
        crash_point(f"phase-{name}.before-ledger")
        self.ledger.append("phase", {"phase": name, **numbers, "artifacts": artifacts})
        crash_point(f"phase-{name}.after-ledger")

    def trained(self, stage: StageRecipe) -> Checkpoint | None:
        """The checkpoint at the end of a stage that current weights descend from; None before it."""
        at = position(self.ledger.entries())
        found = [
            mark
            for name in at.lineage()
            if (mark := at.marks[name]).stage == stage.name and mark.step == stage.steps
        ]
        if not found or (found[-1].name == at.head and at.phase == "gate"):
            return None
        return from_ledger(self.run, found[-1].body)

    def after(self, stage: StageRecipe) -> GPT:
        """The model at a stage's end. DataError when the stage has not ended."""
        checkpoint = self.trained(stage)
        if checkpoint is None:
            raise DataError(f"{self.run.path}: stage '{stage.name}' has not ended")
        return load_weights(checkpoint).eval()

    def base(self) -> GPT:
        """The model that the phases begin with."""
        return self.after(self.grown[-1]) if self.grown else self.given()

    def given(self) -> GPT:
        """The model named as base."""
        if self.start is None:
            raise DataError(f"{self.run.path}: the recipe names no base and has no stage before the phases")
        return self.start

    def engine(self, model: GPT, name: str) -> LocalEngine:
        """A model of this run, asked in its own chat format, where the run trains."""
        device = self.settings.get("device", "cpu")
        dtype = torch.bfloat16 if device != "cpu" and self.settings["dtype"] != "fp32" else None
        return LocalEngine(model.to(device), self.tokenizer, self.chat, name=name, dtype=dtype)

    def turns(self, model: GPT) -> Turns:
        """How conversations become tokens."""
        return Turns(self.engine(model, "encoder"))

    def context(self, model: GPT) -> int:
        """The longest row that is trained on."""
        return min(self.align.context or model.config.context, model.config.context)
