"""Reward models: a GPT's body with a scalar head at the last token, trained on soft preferences.

Ouyang et al. 2022 (arXiv 2203.02155, sec. 3.5) for the architecture; Bai et al. 2022 (arXiv 2212.08073,
sec. 4.3) for soft targets; Coste et al. 2023 (arXiv 2310.02743) for ensembles and their lower bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glasshouse.align.losses import bradley_terry
from glasshouse.align.preferences import Pairs, PairTensors, pair_tensors
from glasshouse.align.sequences import Sequences, pack
from glasshouse.base.config import parse
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.partial import hidden_at
from glasshouse.train import Checkpoint, Loss, StageConfig
from glasshouse.train import checkpoint as saving
from glasshouse.train.memory import Need
from glasshouse.train.objective import Objective
from glasshouse.train.optim import Group, Optimizers, parameter_groups
from glasshouse.train.trainee import LANGUAGE, Look

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Rewards:
    """``values`` fp32 [n]; ``extra``: further numbers [n] each for the log, "disagreement" among them."""

    values: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Says how good answers are. Prompts and answers are token ids; an answer has its end token, if it
    ended. A plain function of both works: numbers [n], or `Rewards`.
    """

    def __call__(self, prompts: Tokens, answers: Tokens) -> Rewards | Tensor | Sequence[float]: ...


class RewardModel(nn.Module):
    """``body`` and a linear ``head`` on its normed residual at the last token of prompt and answer.

    Rewards are (score - ``shift``) / ``scale``; `standardise` sets both, training leaves them alone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, body: GPT):
        super().__init__()
        self.body = body
        if not body.config.tied:  # predicts words, which nobody asks of it here
            body.head.requires_grad_(False)
        self.head = nn.Linear(body.config.d_model, 1)
        # Zero: before any update all answers are equally good, and the loss is log 2.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def config(self) -> GPTConfig:
        """The body's shape."""
        return self.body.config

    def scores(self, rows: Sequences) -> Tensor:
        """Raw scores fp32 [n] of rows, with a gradient."""
        at_end = torch.zeros_like(rows.tokens, dtype=torch.bool).scatter(1, rows.last[:, None], True)
        scores: Tensor = self.head(hidden_at(self.body, rows.tokens, at_end))[:, 0].float()
        return scores

    @torch.no_grad()
    def forward(self, prompts: Tokens, answers: Tokens, batch_size: int = 64) -> Rewards:
        """`Reward`, ``batch_size`` rows at a time. DataError for a row beyond the context."""
        device = self.head.weight.device
        found = [
            self.scores(
                pack(
                    prompts[at : at + batch_size],
                    answers[at : at + batch_size],
                    context=self.config.context - 1,
                    device=device,
                    where="the reward model",
                )
            )
            for at in range(0, len(prompts), batch_size)
        ]
        return Rewards((torch.cat(found) - self.shift) / self.scale)

    def standardise(self, prompts: Tokens, answers: Tokens) -> None:
        """Set shift and scale so that these answers have rewards of mean 0 and standard deviation 1."""
        raw = self(prompts, answers).values * self.scale + self.shift
        self.shift.copy_(raw.mean())
        self.scale.copy_(raw.std().clamp_min(1e-6))


def reward_loss(model: RewardModel, batch: PairTensors) -> Loss:
    """Objective "reward": mean Bradley-Terry cross-entropy in nats against the rows' soft labels."""
    chosen, rejected = model.scores(batch.both).chunk(2)
    total = bradley_terry(chosen, rejected, batch.p).mean()
    with torch.no_grad():
        margin = (chosen - rejected) * torch.where(batch.p < 0.5, -1.0, 1.0)
        told = batch.p != 0.5
        right = float((margin[told] > 0).float().mean()) if bool(told.any()) else float("nan")
    n = float(batch.both.mask.numel())
    return Loss(total, {"reward": total}, {"accuracy": right, "margin": float(margin.mean()), "tokens": n})


class RewardTrainee:
    """How `train.run_stages` trains a `RewardModel`. A checkpoint's model.safetensors and config.json are the
    body's, a GPT like any other; reward.safetensors has head, shift and scale.
    """

    def prepare(self, model: RewardModel, dtype: str, compile: str) -> None:
        """Rows have many widths, for which compiled blocks would be compiled again: never compiled."""
        LANGUAGE.prepare(model.body, dtype, "off")

    def batch(self, batch: Pairs, model: RewardModel, where: str) -> PairTensors:
        return pair_tensors(batch, model.config.context - 1, model.head.weight.device, where)

    def groups(self, model: RewardModel, config: StageConfig) -> list[Group]:
        head = tuple((f"head.{name}", p) for name, p in model.head.named_parameters())
        return [
            *prefixed(model.body, "body", config),
            Group("score head", "adamw", config.adam_lr, 0.0, head),
        ]

    def after_backward(self, model: RewardModel) -> None:
        """Nothing: gradients go to the optimisers as they are."""

    def after_update(
        self, model: RewardModel, optimizers: Optimizers, batch: Any, loss: Loss, step: int
    ) -> None:
        """Nothing: the optimisers' update is all."""

    def look(self, model: RewardModel) -> Look | None:
        return None

    def need(self, model: RewardModel, objective: Objective, batch: Any, dtype: str) -> Need | None:
        return None

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {key: loss.metrics[key] for key in ("accuracy", "margin")}

    def write(self, model: RewardModel, folder: Path) -> None:
        saving.write_gpt(model.body, folder)
        own = {name: t for name, t in saving.weights(model).items() if not name.startswith("body.")}
        saving.write_tensors(folder / "reward.safetensors", own)

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: RewardModel) -> RewardModel:
        saving.gpt_into(checkpoint, contents, model.body)
        load_head(model, contents["reward.safetensors"], str(checkpoint.path / "reward.safetensors"))
        return model


def prefixed(gpt: GPT, prefix: str, config: StageConfig) -> list[Group]:
    """The parameter groups of a GPT that is a part of a larger module, by their names in that."""
    return [
        Group(g.name, g.optimizer, g.lr, g.weight_decay, tuple((f"{prefix}.{n}", p) for n, p in g.parameters))
        for g in parameter_groups(gpt, config)
    ]


def load_head(model: RewardModel, data: bytes, where: str) -> None:
    """Head, shift and scale from a file's bytes. CheckpointError when they do not fit."""
    found = saving.read_tensors(data, where)
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith("body.")}
    if found.keys() != own.keys() or any(found[n].shape != own[n].shape for n in own):
        raise CheckpointError(f"{where}: not the head of a reward model of this width; train it again")
    if not all(bool(torch.isfinite(t).all()) for t in found.values()):
        raise CheckpointError(f"{where}: a number is not finite; take an earlier checkpoint")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def save_reward(model: RewardModel, folder: Path) -> None:
    """Write a reward model as `load_reward` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    RewardTrainee().write(model, folder)


def load_reward(folder: Path | Checkpoint) -> RewardModel:
    """A reward model from a folder or a run's checkpoint (whose digests are checked first)."""
    if isinstance(folder, Checkpoint):
        contents, path = saving.read_checked(folder), folder.path
    else:
        path = Path(folder)
        names = ("config.json", "model.safetensors", "reward.safetensors")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UsageError(f"{path} holds no reward model: {missing[0]} is missing")
        contents = {name: (path / name).read_bytes() for name in names}
    config = parse(GPTConfig, json.loads(contents["config.json"]), str(path / "config.json"))
    model = RewardModel(GPT(config))
    saving.weights_into(model.body, contents["model.safetensors"], str(path / "model.safetensors"))
    load_head(model, contents["reward.safetensors"], str(path / "reward.safetensors"))
    return model.eval()


class Ensemble:
    """Several rewards as one: their mean, less ``caution`` standard deviations, which also go to the log as
    "disagreement".
    """

    def __init__(self, members: Sequence[Reward], caution: float = 0.0):
        if len(members) < 2:
            raise UsageError(f"an ensemble needs at least two reward models, not {len(members)}")
        self.members, self.caution = tuple(members), caution

    def __call__(self, prompts: Tokens, answers: Tokens) -> Rewards:
        each = torch.stack([rewards_of(one(prompts, answers)).values for one in self.members])
        spread = each.std(dim=0)
        return Rewards(each.mean(dim=0) - self.caution * spread, {"disagreement": spread})


def rewards_of(given: Rewards | Tensor | Sequence[float]) -> Rewards:
    """What a `Reward` returned, as `Rewards`."""
    if isinstance(given, Rewards):
        return given
    return Rewards(torch.as_tensor(given, dtype=torch.float32))
