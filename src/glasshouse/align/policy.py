"""A policy in training: a GPT, its frozen reference, a value head if the method needs one; and what a method
is told (`RLConfig`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from glasshouse.base.config import Frozen
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError, Halt, UsageError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.model import GPT
from glasshouse.train import StageConfig


class KLBlowUp(Halt):
    """The policy went further from its reference than was declared to be allowed."""


class RLConfig(Frozen):
    """What decides an RL stage besides its `StageConfig`. A loop step is one update.

    A rollout lasts ``epochs`` times ``minibatches`` steps: its answers are cut into so many minibatches, and
    each is learnt from once an epoch. 1 and 1 is on policy: fresh answers for every update.
    """

    method: Literal["ppo", "grpo"] = "grpo"
    max_new_tokens: int = Field(ge=1)
    stop: tuple[int, ...] = Field((), description="token ids that end an answer")
    vocab: int | None = Field(None, ge=1, description="the tokenizer's size; ids beyond are never drawn")
    group: int = Field(8, ge=1, description="answers to each prompt; grpo needs at least 2")
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    beta: float = Field(0.05, ge=0, description="nats of KL to the reference cost so much reward each")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="reward: E[r] - beta KL is climbed; loss: beta times k3, as in the GRPO paper"
    )
    clip: float = Field(0.2, gt=0, lt=1)
    clip_high: float | None = Field(None, gt=0, description="upper bound of the ratio less 1; None: clip")
    value_clip: float | None = Field(0.2, gt=0)
    value_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten: bool = Field(True, description="ppo: advantages of a rollout to mean 0, deviation 1")
    scale: Literal["group", "batch", "none"] = Field("group", description="grpo: what advantages are over")
    over: Literal["tokens", "sequences"] = "tokens"
    reward_limit: float | None = Field(None, gt=0, description="rewards are cut to +- this")
    unended: float | None = Field(None, description="reward of an answer that the limit cut, in its stead")
    kl_at_most: float | None = Field(None, gt=0, description="nats an answer; beyond it the run halts")
    on_flag: Literal["log", "stop"] = Field("log", description="stop: the run halts when its watch flags it")
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "grpo" and self.group < 2:
            raise ValueError("grpo compares answers to one prompt: group must be at least 2")
        return self

    @property
    def updates(self) -> int:
        """Steps that a rollout lasts."""
        return self.epochs * self.minibatches


class Policy(nn.Module):
    """``gpt`` learns; ``reference`` does not, is no part of checkpoints, and must be given again on resume
    (whoever builds the model builds it from the same checkpoint; its digest is the run's identity's affair).

    ``rollout``: what the current updates learn from; saved with a checkpoint that falls between two of them.
    """

    reference: GPT

    def __init__(self, gpt: GPT, reference: GPT | None = None, *, critic: bool = False):
        super().__init__()
        self.gpt = gpt
        frozen = copy.deepcopy(gpt) if reference is None else reference
        if frozen is gpt:
            raise UsageError("the reference must be a model of its own: give a copy, or None")
        if frozen.config.vocab_size != gpt.config.vocab_size:
            raise UsageError("the reference has another vocabulary than the policy: they cannot be compared")
        for p in frozen.parameters():
            p.requires_grad_(False)
        object.__setattr__(self, "reference", frozen.eval())  # no submodule: neither trained nor saved
        self.value = nn.Linear(gpt.config.d_model, 1) if critic else None
        if self.value is not None:
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
        self.rollout: Any = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.reference._apply(fn, recurse)
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.gpt.device


# -- prompts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """What `Stage.batches` gives: prompts as token ids, the step, and the shard of each."""

    step: int
    ids: tuple[tuple[int, ...], ...]
    rows: tuple[str, ...]

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards drawn from."""
        return tuple(sorted(set(self.rows)))


def prompt_plan(shards: Mapping[str, Sequence[Sequence[int]]]) -> DataPlan:
    """All prompts of every shard equally often, from the first step on; digests are of their contents."""
    digests = {name: digest_of([list(p) for p in prompts]) for name, prompts in shards.items()}
    weights = {name: float(len(prompts)) for name, prompts in shards.items()}
    return DataPlan(phases=(Phase(from_step=0, weights=weights),), digests=digests)


def prompt_batches(
    shards: Mapping[str, Sequence[Sequence[int]]], config: StageConfig, how: RLConfig
) -> Callable[[int, DataPlan], Prompts]:
    """``batches(step, plan)``: the same prompts for all updates of a rollout, drawn with replacement by the
    plan's weights. ``config.batch_size`` counts answers, a rollout's whole: prompts are as many / ``group``.

    Raises UsageError for sizes that do not divide, and for steps or gates that would cut a rollout in two.
    """
    if config.batch_size % how.group or config.batch_size % how.minibatches:
        raise UsageError(
            f"stage '{config.name}': batch_size {config.batch_size} answers do not divide into groups of "
            f"{how.group} and {how.minibatches} minibatches"
        )
    if config.accumulate != 1:
        raise UsageError(f"stage '{config.name}': set minibatches instead of accumulate, which RL cannot use")
    for name, number in (("steps", config.steps), ("gate_every", config.gate_every)):
        if number % how.updates:
            raise UsageError(
                f"stage '{config.name}': {name} {number} is no multiple of the {how.updates} updates that a "
                "rollout lasts (epochs * minibatches)"
            )

    def batches(step: int, plan: DataPlan) -> Prompts:
        first = step - step % how.updates
        phase = plan.at(first)
        names = phase.active
        weights = [phase.weights[name] for name in names]
        random = generator("rl-prompts", how.seed, first)
        drawn = random.choice(len(names), size=config.batch_size // how.group, p=_shares(weights))
        ids = []
        for k in drawn:
            prompts = shards[names[k]]
            if not prompts:
                raise DataError(f"the shard '{names[k]}' holds no prompt")
            ids.append(tuple(prompts[int(random.integers(len(prompts)))]))
        return Prompts(step, tuple(ids), tuple(names[k] for k in drawn))

    return batches


def _shares(weights: Sequence[float]) -> list[float]:
    return [w / sum(weights) for w in weights]
