"""Dictionaries as a module of the one training loop: several at once on the same activations.

Every dictionary has its own loss, optimiser and clipping, so each comes out as if it had been trained alone;
they share the reading of activations, the guard against what is not finite, and checkpoints, in which each
has its own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.base.config import parse
from glasshouse.base.errors import CheckpointError, DataError, UsageError
from glasshouse.base.rng import seed_from
from glasshouse.interp.dictionaries.auxiliary import resample
from glasshouse.interp.dictionaries.config import DictionaryConfig
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary
from glasshouse.interp.dictionaries.losses import dictionary_loss
from glasshouse.train import Checkpoint, Loss, StageConfig
from glasshouse.train import checkpoint as saving
from glasshouse.train.memory import Need
from glasshouse.train.objective import Objective
from glasshouse.train.optim import Group, Optimizers
from glasshouse.train.trainee import Look

NAME = re.compile(r"[a-z][a-z0-9_-]{0,40}")


@dataclass(frozen=True)
class Sites:
    """Activations [n, width] of several sites at the same positions; ``shards`` names their sources."""

    acts: Mapping[str, Tensor]
    shards: tuple[str, ...] = ()

    def of(self, config: DictionaryConfig) -> ActivationBatch:
        """What a dictionary of ``config`` reads, and a transcoder's targets. DataError if it is missing."""
        written = (config.site_out or config.site) if config.is_transcoder else None
        for site in (config.site, written):
            if site is not None and site not in self.acts:
                raise DataError(f"the stream has no site {site!r}, only {', '.join(self.acts)}")
        return ActivationBatch(
            self.acts[config.site], None if written is None else self.acts[written], self.shards
        )


class Bank(nn.Module):
    """Named dictionaries. UsageError for a name that cannot be a file's."""

    def __init__(self, dictionaries: Mapping[str, Dictionary]):
        super().__init__()
        for name in dictionaries:
            if not NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
                raise UsageError(
                    f"{name!r} cannot name a dictionary: use a-z, 0-9, _ and -, and no word of Python's own"
                )
        self.dictionaries = nn.ModuleDict(dictionaries)

    def named(self) -> dict[str, Dictionary]:
        """The dictionaries by name."""
        return {name: d for name, d in self.dictionaries.items() if isinstance(d, Dictionary)}


def bank_loss(bank: Bank, batch: Sites) -> Loss:
    """The sum of every dictionary's own loss: their gradients have nothing to do with each other."""
    parts: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    totals = []
    alone = len(bank.dictionaries) == 1
    for name, dictionary in bank.named().items():
        loss = dictionary_loss(dictionary, batch.of(dictionary.config))
        totals.append(loss.total)
        before = "" if alone else f"{name}/"
        parts |= {f"{before}{part}": value for part, value in loss.parts.items()}
        metrics |= {f"{before}{key}": value for key, value in loss.metrics.items() if key != "tokens"}
    return Loss(
        sum(totals[1:], totals[0]), parts, metrics | {"tokens": float(len(next(iter(batch.acts.values()))))}
    )


class BankTrainee:
    """How a `Bank` trains. ``lr``: each dictionary's peak rate; ``resample_every`` steps dead features of
    autoencoders are drawn anew (0: never).
    """

    def __init__(self, lr: Mapping[str, float], resample_every: int = 0, seed: int = 0):
        self.lr, self.resample_every, self.seed = dict(lr), resample_every, seed

    def prepare(self, model: Bank, dtype: str, compile: str) -> None:
        if dtype not in ("fp32", "bf16") or compile != "off":
            raise UsageError("dictionaries train in fp32 or bf16, uncompiled: their fast path is their own")

    def batch(self, batch: Sites, model: Bank, where: str) -> Sites:
        device = next(model.parameters()).device
        return Sites({s: x.to(device, non_blocking=True) for s, x in batch.acts.items()}, batch.shards)

    def groups(self, model: Bank, config: StageConfig) -> list[Group]:
        if config.accumulate != 1:
            raise UsageError("a dictionary looks at its whole batch: set accumulate = 1, or a smaller batch")
        made = []
        for name, dictionary in model.named().items():
            members = tuple((f"{name}.{p}", tensor) for p, tensor in dictionary.named_parameters())
            made.append(Group(name, "adamw", self.lr[name], 0.0, members, clipped_with=name))
        return made

    def after_backward(self, model: Bank) -> None:
        for dictionary in model.named().values():
            dictionary.project_gradient()

    def after_update(self, model: Bank, optimizers: Optimizers, batch: Sites, loss: Loss, step: int) -> None:
        for name, dictionary in model.named().items():
            dictionary.constrain()
            if self.resample_every and (step + 1) % self.resample_every == 0:
                # Only its own name and the step decide what is drawn, whatever trains beside it.
                seed = seed_from("resample", self.seed, name, step)
                resample(dictionary, batch.of(dictionary.config).x, seed, optimizers.inner)

    def look(self, model: Bank) -> Look | None:
        """None: what there is to see is in every metrics row."""
        return None

    def need(self, model: Bank, objective: Objective, batch: Sites, dtype: str) -> Need | None:
        """None: a loss counts features, so it is not tried out."""
        return None

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {key: value for key, value in loss.metrics.items() if key != "tokens"}

    def write(self, model: Bank, folder: Path) -> None:
        for name, dictionary in model.named().items():
            saving.write_config(folder / f"{name}.dictionary.json", dictionary.config)
            saving.write_tensors(folder / f"{name}.dictionary.safetensors", saving.weights(dictionary))

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Bank) -> Bank:
        stored = _stored(contents)
        if set(stored) != set(model.named()):
            raise CheckpointError(
                f"{checkpoint.path} holds dictionaries {', '.join(sorted(stored))}, not "
                f"{', '.join(sorted(model.named()))}: resume with those that the run was begun with"
            )
        for name, dictionary in model.named().items():
            if _config(checkpoint, contents, name) != dictionary.config:
                raise CheckpointError(
                    f"{checkpoint.path / name}.dictionary.json: another configuration of '{name}' than now; "
                    "resume with the one that the run was begun with"
                )
            _into(checkpoint, contents, name, dictionary)
        return model


def read_dictionaries(checkpoint: Checkpoint) -> dict[str, Dictionary]:
    """The dictionaries of a checkpoint, by name, digests checked first; what a gate on them begins with.

    Raises CheckpointError when a file is missing, changed or truncated, or the checkpoint has no dictionary.
    """
    contents = saving.read_checked(checkpoint)
    found = {}
    for name in _stored(contents):
        found[name] = Dictionary(_config(checkpoint, contents, name))
        _into(checkpoint, contents, name, found[name])
    if not found:
        raise CheckpointError(f"{checkpoint.path} holds no dictionary; is it a language model's checkpoint?")
    return found


def _stored(contents: Mapping[str, bytes]) -> list[str]:
    ending = ".dictionary.json"
    return [name.removesuffix(ending) for name in contents if name.endswith(ending)]


def _config(checkpoint: Checkpoint, contents: Mapping[str, bytes], name: str) -> DictionaryConfig:
    file = f"{name}.dictionary.json"
    return parse(DictionaryConfig, json.loads(contents[file]), str(checkpoint.path / file))


def _into(checkpoint: Checkpoint, contents: Mapping[str, bytes], name: str, dictionary: Dictionary) -> None:
    file = f"{name}.dictionary.safetensors"
    if file not in contents:
        raise CheckpointError(f"{checkpoint.path / file} is missing: restore it from a backup")
    saving.weights_into(dictionary, contents[file], str(checkpoint.path / file))


@torch.no_grad()
def warm(dictionary: Dictionary, start: Dictionary) -> Dictionary:
    """Bring ``dictionary`` to the weights, scales and counters of ``start``, an earlier one of its shape.

    UsageError when the shapes differ.
    """
    there, here = start.state_dict(), dictionary.state_dict()
    wrong = sorted(
        n
        for n in there.keys() ^ here.keys()
        | {n for n in there.keys() & here.keys() if there[n].shape != here[n].shape}
    )
    if wrong:
        raise UsageError(
            f"cannot start from a {start.config.architecture} dictionary {start.config.d_in} to "
            f"{start.config.d_sae}: {', '.join(wrong)} differ; give the same architecture and widths"
        )
    dictionary.load_state_dict(there)
    return dictionary
