"""DPO through the one loop, and best-of-n: the two ways to use preferences and rewards without RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from glasshouse.align.files import PolicyFiles, without_critic
from glasshouse.align.losses import dpo
from glasshouse.align.policy import KLBlowUp, Policy
from glasshouse.align.preferences import Pairs, PairTensors, pair_tensors
from glasshouse.align.reward import Reward, rewards_of
from glasshouse.align.rollout import Answer, Drawing, Embedded, Rollouts
from glasshouse.align.sequences import logprobs, read
from glasshouse.base.errors import UsageError
from glasshouse.base.rng import seed_from
from glasshouse.model import GPT
from glasshouse.train import Loss
from glasshouse.train.objective import autocast
from glasshouse.train.optim import Optimizers
from glasshouse.train.trainee import LANGUAGE


@dataclass(frozen=True)
class DPOBatch:
    """Pairs with the reference's log-probabilities, the ``beta`` they are learnt with, and the limit."""

    pairs: PairTensors
    beta: float
    moved_at_most: float | None = None
    where: str = "dpo"

    @property
    def shards(self) -> tuple[str, ...]:
        """Where the pairs come from."""
        return self.pairs.shards

    @property
    def notes(self) -> dict[str, Any]:
        """Numbers for the log, filled in by the objective."""
        return self.pairs.notes


def dpo_loss(model: Policy, batch: DPOBatch) -> Loss:
    """Objective "dpo": mean over pairs, each by its soft label; the reference's part comes with the batch.

    Raises `KLBlowUp`, before the update, when answers moved further than ``moved_at_most``.
    """
    pairs, ref = batch.pairs, batch.pairs.ref_logp
    assert ref is not None
    logp = read(model.gpt, pairs.both, entropy="none").logp.sum(dim=1)
    chosen, rejected = logp.chunk(2)
    ref_chosen, ref_rejected = ref.chunk(2)
    total = dpo(chosen, rejected, ref_chosen, ref_rejected, batch.beta, pairs.p).mean()
    with torch.no_grad():
        won, lost = chosen - ref_chosen, rejected - ref_rejected
        margin = batch.beta * (won - lost) * torch.where(pairs.p < 0.5, -1.0, 1.0)
        notes = {
            "reward": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen": won.mean(),
            "rejected": lost.mean(),
            "length": pairs.both.mask.sum(dim=1).mean(),
        }
    pairs.notes.update({name: float(x) for name, x in notes.items()})
    moved = max(abs(pairs.notes["chosen"]), abs(pairs.notes["rejected"]))
    if batch.moved_at_most is not None and moved > batch.moved_at_most:
        raise KLBlowUp(
            f"{batch.where}: answers moved {moved:.3g} nats from the reference, and "
            f"{batch.moved_at_most:.3g} were declared the most; everything up to here is saved. Take a "
            "larger beta or lower rates"
        )
    metrics = {"margin": pairs.notes["reward"], "accuracy": pairs.notes["accuracy"]}
    return Loss(total, {"dpo": total}, metrics | {"tokens": float(pairs.both.mask.numel())})


class DPOTrainee(PolicyFiles):
    """How `train.run_stages` trains a `Policy` on preference rows (`preferences.pair_batches`).

    The rows of kind "rl" say the mean implicit reward margin, its accuracy, and how far chosen and rejected
    answers moved from the reference (nats). ``moved_at_most``: the run halts when either moved further.
    """

    def __init__(self, beta: float = 0.1, moved_at_most: float | None = None):
        if beta <= 0:
            raise UsageError(f"dpo needs a beta above 0, not {beta}")
        self.beta, self.moved_at_most, self.dtype = beta, moved_at_most, "fp32"

    def prepare(self, model: Policy, dtype: str, compile: str) -> None:
        """Rows have many widths, so blocks are never compiled. UsageError for a policy with a critic."""
        without_critic(model, "dpo")
        LANGUAGE.prepare(model.gpt, dtype, "off")
        model.rollout, self.dtype = None, dtype

    def batch(self, batch: Pairs, model: Policy, where: str) -> DPOBatch:
        """Pairs as tensors; one batched pass of the reference. Raises DataError as `pair_tensors`."""
        pairs = pair_tensors(batch, model.gpt.config.context, model.device, where)
        with autocast(self.dtype, model.device):
            ref = logprobs(model.reference, pairs.both).sum(dim=1)
        return DPOBatch(replace(pairs, ref_logp=ref), self.beta, self.moved_at_most, where)

    def after_update(
        self, model: Policy, optimizers: Optimizers, batch: DPOBatch, loss: Loss, step: int
    ) -> None:
        """Nothing: the optimisers' update is all."""

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {key: loss.metrics[key] for key in ("accuracy", "margin")}


@dataclass(frozen=True)
class Best:
    """The best of n answers, its reward, and all n rewards."""

    answer: Answer
    reward: float
    rewards: tuple[float, ...]


def best_of(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n: int,
    reward: Reward,
    how: Drawing,
    *,
    seed: int = 0,
    rollouts: Rollouts | None = None,
) -> list[Best]:
    """Of ``n`` sampled answers to each prompt the one with the highest reward (the first on ties)."""
    if n < 1:
        raise UsageError(f"best of n needs at least one answer, not {n}")
    every = [list(p) for p in prompts for _ in range(n)]
    seeds = [seed_from("best-of", seed, i // n, i % n) for i in range(len(every))]
    answers = (rollouts or Embedded()).sample(model, every, seeds, how)
    given = rewards_of(reward(every, [a.ids for a in answers])).values.view(-1, n)
    found = []
    for i, row in enumerate(given.tolist()):
        best = max(range(n), key=lambda k: row[k])
        found.append(Best(answers[i * n + best], row[best], tuple(row)))
    return found


def best_of_kl(n: int) -> float:
    """Upper bound, in nats, of the KL from the sampler to its best of ``n``: log n - (n - 1) / n (Stiennon et
    al. 2020, app. G.3; exact where answers never tie, Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
