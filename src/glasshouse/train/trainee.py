"""What the loop must be told about the module it trains. GPTs are the default; `interp.dictionaries` trains
its dictionaries through the same loop, checkpoints, guards and gates with a `Trainee` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from glasshouse.model.compiled import compile_blocks, is_compiled
from glasshouse.model.float8 import use_float8, uses_float8
from glasshouse.train import checkpoint as saving
from glasshouse.train import memory
from glasshouse.train.config import StageConfig
from glasshouse.train.gate import Checkpoint
from glasshouse.train.monitor import Monitor
from glasshouse.train.objective import Loss, Objective, bits_per_byte
from glasshouse.train.optim import Group, Optimizers, parameter_groups
from glasshouse.train.step import checked


class Look(Protocol):
    """A look inside around one update: `before` with the gradients in ``.grad``, `after` it."""

    def before(self, objective: Objective, batch: Any, dtype: str, norm: float, accumulate: int = 1) -> None:
        """Measure what needs the weights and gradients before the update."""

    def after(self) -> dict[str, Any]:
        """The metrics row."""


class Trainee(Protocol):
    """How one kind of module is prepared, fed, updated, looked at and stored.

    Everything that decides a bit of training must be in the module's parameters and buffers that `write`
    stores, or follow from (step, plan): that is what makes a killed run continue bit for bit.
    """

    def prepare(self, model: Any, dtype: str, compile: str) -> None:
        """Switch the module to the settings' faster paths; called before every stage, must be idempotent."""

    def batch(self, batch: Any, model: Any, where: str) -> Any:
        """What `Stage.batches` gave as tensors on the module's device, with ``shards``: names of its sources.

        Raises DataError, beginning with ``where``, when it does not fit the module.
        """

    def groups(self, model: Any, config: StageConfig) -> list[Group]:
        """Every trainable parameter in one group."""

    def after_backward(self, model: Any) -> None:
        """Change gradients, before their norms are taken and clipped."""

    def after_update(self, model: Any, optimizers: Optimizers, batch: Any, loss: Loss, step: int) -> None:
        """Renormalise, count, revive: after update ``step`` (from 0) was applied; not if it was skipped."""

    def look(self, model: Any) -> Look | None:
        """A monitor for this update, or None if nothing is looked at."""

    def need(self, model: Any, objective: Objective, batch: Any, dtype: str) -> memory.Need | None:
        """Bytes of activations, without changing anything; None where nobody counts."""

    def numbers(self, loss: Loss) -> dict[str, Any]:
        """What a metrics row says about a loss besides its total and parts."""

    def write(self, model: Any, folder: Path) -> None:
        """Write config, parameters and persistent buffers as files (no folders) of a checkpoint."""

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Any) -> Any:
        """Bring ``model`` to what `write` stored; CheckpointError if it does not fit. Returns it."""


class GPTTrainee:
    """A GPT: rows of tokens, Muon and AdamW, monitors through taps."""

    def prepare(self, model: Any, dtype: str, compile: str) -> None:
        if dtype == "fp8" and not uses_float8(model):
            use_float8(model)
        if compile == "on" and not is_compiled(model):
            compile_blocks(model)

    def batch(self, batch: Any, model: Any, where: str) -> Any:
        return checked(batch, model, where)

    def groups(self, model: Any, config: StageConfig) -> list[Group]:
        return parameter_groups(model, config)

    def after_backward(self, model: Any) -> None:
        """Nothing: gradients go to the optimisers as they are."""

    def after_update(self, model: Any, optimizers: Optimizers, batch: Any, loss: Loss, step: int) -> None:
        """Nothing: the optimisers' update is all."""

    def look(self, model: Any) -> Look | None:
        return Monitor(model)

    def need(self, model: Any, objective: Objective, batch: Any, dtype: str) -> memory.Need | None:
        return memory.need(model, objective, batch, dtype)

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {"bpb": bits_per_byte(loss.metrics.get("nats", float("nan")), loss.metrics.get("n_bytes", 0))}

    def write(self, model: Any, folder: Path) -> None:
        saving.write_gpt(model, folder)

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Any) -> Any:
        return saving.gpt_into(checkpoint, contents, model)


LANGUAGE = GPTTrainee()
