"""What every way of training a `Policy` shares: its parameter groups, the row for the log, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.align.collect import Rollout
from glasshouse.align.policy import Policy
from glasshouse.align.reward import prefixed
from glasshouse.align.sequences import Sequences
from glasshouse.align.watch import Online
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.digest import weights_digest
from glasshouse.train import Checkpoint, StageConfig
from glasshouse.train import checkpoint as saving
from glasshouse.train.memory import Need
from glasshouse.train.objective import Objective
from glasshouse.train.optim import Group
from glasshouse.train.trainee import Look


def without_critic(model: Policy, method: str) -> None:
    """UsageError for a critic that ``method`` would leave untrained."""
    if model.value is not None:
        raise UsageError(f"{method} has no use for a critic: build the policy without critic=True")


class Row:
    """A look that only writes down: the row of kind "rl"."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}

    def before(self, objective: Objective, batch: Any, dtype: str, norm: float, accumulate: int = 1) -> None:
        """What the objective noted about the batch."""
        self.row = {"kind": "rl", **batch.notes}

    def after(self) -> dict[str, Any]:
        """The row."""
        return self.row


class PolicyFiles:
    """The part of a `Trainee` that does not depend on the method.

    A checkpoint's model.safetensors and config.json are the GPT's alone, so that gates judge it as any other;
    critic.safetensors and rollout.safetensors hold the rest, rl.json what a watch on the proxy has seen.
    """

    watch: Online | None = None

    def groups(self, model: Policy, config: StageConfig) -> list[Group]:
        made = prefixed(model.gpt, "gpt", config)
        if model.value is not None:
            own = tuple((f"value.{name}", p) for name, p in model.value.named_parameters())
            made.append(Group("value head", "adamw", config.adam_lr, 0.0, own))
        return made

    def after_backward(self, model: Policy) -> None:
        """Nothing: gradients go to the optimisers as they are."""

    def look(self, model: Policy) -> Look | None:
        return Row()

    def need(self, model: Policy, objective: Objective, batch: Any, dtype: str) -> Need | None:
        return None

    def write(self, model: Policy, folder: Path) -> None:
        saving.write_gpt(model.gpt, folder)
        if model.value is not None:
            own: dict[str, Tensor] = {f"value.{n}": p for n, p in model.value.named_parameters()}
            saving.write_tensors(folder / "critic.safetensors", own)
        if model.rollout is not None:
            saving.write_tensors(folder / "rollout.safetensors", _tensors(model.rollout))
        told: dict[str, Any] = {"reference": weights_digest(model.reference), "rollout": _told(model.rollout)}
        if self.watch is not None:
            told["watched"] = self.watch.kept
        (folder / "rl.json").write_text(json.dumps(told, sort_keys=True) + "\n", "utf-8")

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Policy) -> Policy:
        saving.gpt_into(checkpoint, contents, model.gpt)
        told, path = json.loads(contents["rl.json"]), checkpoint.path
        if told["reference"] != weights_digest(model.reference):
            raise CheckpointError(
                f"{path / 'rl.json'}: trained against another reference than the one given now; give the "
                "model that the stage began with"
            )
        if (model.value is not None) != ("critic.safetensors" in contents):
            raise CheckpointError(
                f"{path}: a critic is there or here, but not both; resume with its own recipe"
            )
        if model.value is not None:
            where = str(path / "critic.safetensors")
            found = saving.read_tensors(contents["critic.safetensors"], where)
            with torch.no_grad():
                for name, p in model.value.named_parameters():
                    p.copy_(found[f"value.{name}"])
        if self.watch is not None:
            self.watch.again(told.get("watched", []))
        model.rollout = None
        if told["rollout"] is not None:
            where = str(path / "rollout.safetensors")
            tensors = saving.read_tensors(contents["rollout.safetensors"], where)
            model.rollout = _rollout(told["rollout"], tensors, model.device)
        return model


def _tensors(rollout: Rollout) -> dict[str, Tensor]:
    s = rollout.sequences
    every: dict[str, Tensor | None] = {"tokens": s.tokens, "mask": s.mask, "last": s.last}
    every |= {name: getattr(rollout, name) for name in _FIELDS}
    return {name: t for name, t in every.items() if t is not None}


_FIELDS = ("old_logp", "ref_logp", "reward", "advantages", "returns", "values")


def _told(rollout: Rollout | None) -> dict[str, Any] | None:
    if rollout is None:
        return None
    return {"first": rollout.first, "shards": list(rollout.shards), "row": rollout.row}


def _rollout(told: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Rollout:
    found = {name: t.to(device) for name, t in tensors.items()}
    sequences = Sequences(found["tokens"], found["mask"], found["last"])
    bare = Rollout(
        told["first"],
        sequences,
        found["old_logp"],
        found["ref_logp"],
        found["reward"],
        tuple(told["shards"]),
        row=dict(told["row"]),
    )
    return replace(
        bare, advantages=found.get("advantages"), returns=found.get("returns"), values=found.get("values")
    )
