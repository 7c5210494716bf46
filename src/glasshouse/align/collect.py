"""From prompts to what an update learns from: answers, rewards, distances to the reference, advantages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glasshouse.align.heldout import over_prompts
from glasshouse.align.kl import kl_k1, kl_k3
from glasshouse.align.losses import explained_variance, gae, grpo_advantages, masked_whiten
from glasshouse.align.policy import KLBlowUp, Policy, Prompts, RLConfig
from glasshouse.align.reward import Reward, rewards_of
from glasshouse.align.rollout import Answer, Drawing, Rollouts
from glasshouse.align.sequences import Sequences, logprobs, pack, read
from glasshouse.base.errors import TrainingError
from glasshouse.base.rng import generator, seed_from
from glasshouse.model.partial import hidden_at


@dataclass(frozen=True)
class Rollout:
    """N answers [N, P]: the log-probabilities of what drew them and of the reference, reward [N].

    ``advantages``, ``returns`` and ``values`` are None until there is a critic's view of it; GRPO's never has
    returns. ``first``: the step at which it was drawn; ``row``: its numbers for the log.
    """

    first: int
    sequences: Sequences
    old_logp: Tensor
    ref_logp: Tensor
    reward: Tensor
    shards: tuple[str, ...]
    advantages: Tensor | None = None
    returns: Tensor | None = None
    values: Tensor | None = None
    row: dict[str, Any] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Rollout:
        """Some of the answers."""
        sequences = self.sequences.take(rows)
        width = sequences.mask.shape[1]

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows, :width]

        return replace(
            self,
            sequences=sequences,
            old_logp=self.old_logp[rows, :width],
            ref_logp=self.ref_logp[rows, :width],
            reward=self.reward[rows],
            advantages=some(self.advantages),
            returns=some(self.returns),
            values=some(self.values),
        )


def sampled(
    policy: Policy, batch: Prompts, how: RLConfig, rollouts: Rollouts, where: str
) -> tuple[list[list[int]], list[Answer]]:
    """``how.group`` answers to each prompt, drawn with seeds of (seed, step, prompt, answer)."""
    prompts = [list(p) for p in batch.ids for _ in range(how.group)]
    first = batch.step - batch.step % how.updates
    seeds = [seed_from("rollout", how.seed, first, i) for i in range(len(prompts))]
    drawing = Drawing(how.max_new_tokens, how.stop, how.vocab)
    answers = rollouts.sample(policy.gpt, prompts, seeds, drawing)
    empty = next((i for i, answer in enumerate(answers) if not answer.ids), None)
    if len(answers) != len(prompts) or empty is not None:
        what = (
            f"{len(answers)} answers to {len(prompts)} prompts" if empty is None else "an answer of nothing"
        )
        raise TrainingError(f"{where}: whoever samples gave {what}; check the engine and its end token")
    return prompts, answers


@torch.no_grad()
def collect(
    policy: Policy,
    batch: Prompts,
    how: RLConfig,
    rollouts: Rollouts,
    reward: Reward,
    probes: Mapping[str, Reward],
    where: str,
) -> Rollout:
    """Draw, reward and measure. Raises TrainingError for a reward that is not finite or of the wrong number,
    `KLBlowUp` when the mean KL to the reference is above ``how.kl_at_most``.
    """
    prompts, answers = sampled(policy, batch, how, rollouts, where)
    ids = [answer.ids for answer in answers]
    rows = pack(prompts, ids, context=policy.gpt.config.context, device=policy.device, where=where)
    old = _told(answers, rows)
    old = logprobs(policy.gpt, rows) if old is None else old
    ref = logprobs(policy.reference, rows)
    given = rewards_of(reward(prompts, ids))
    values = given.values.to(rows.mask)
    if values.shape != (len(ids),) or not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"{where}: the reward gave {tuple(values.shape)} numbers for {len(ids)} answers, or one that is "
            "not finite; nothing was learnt from them"
        )
    row = _row(rows, answers, old, ref, values)
    row |= {name: float(x.float().mean()) for name, x in given.extra.items()}
    for name, probe in probes.items():
        found = rewards_of(probe(prompts, ids)).values.float()
        row[name] = float(found.mean())
        if math.isfinite(sure := over_prompts(found, how.group)):
            row[f"{name}_se"] = sure
    if how.kl_at_most is not None and row["kl"] > how.kl_at_most:
        raise KLBlowUp(
            f"{where}: the policy is {row['kl']:.3g} nats an answer from its reference, and "
            f"{how.kl_at_most:.3g} were declared the most; everything up to here is saved. Start a new run "
            "with a larger beta or lower rates, or with a higher kl_at_most"
        )
    if how.unended is not None:
        cut = torch.tensor([not answer.ended for answer in answers], device=values.device)
        values = torch.where(cut, how.unended, values)
    if how.reward_limit is not None:
        values = values.clamp(-how.reward_limit, how.reward_limit)
    first = batch.step - batch.step % how.updates
    return Rollout(first, rows, old, ref, values, batch.shards, row=row)


def _told(answers: Sequence[Answer], rows: Sequences) -> Tensor | None:
    """Log-probabilities [N, P] that came with the answers, or None."""
    if any(answer.logprobs is None for answer in answers):
        return None
    flat = [x for answer in answers for x in answer.logprobs or ()]
    told = torch.tensor(flat, dtype=torch.float32, device=rows.mask.device)
    return torch.zeros_like(rows.mask).masked_scatter(rows.mask.bool(), told)


def _row(
    rows: Sequences, answers: Sequence[Answer], old: Tensor, ref: Tensor, reward: Tensor
) -> dict[str, Any]:
    mask, n = rows.mask, len(answers)
    lengths = mask.sum(dim=1)
    return {
        "reward": float(reward.mean()),
        "reward_std": float(reward.std()) if n > 1 else 0.0,
        "kl": float((kl_k1(old, ref) * mask).sum(dim=1).mean()),
        "kl_k3": float((kl_k3(old, ref) * mask).sum(dim=1).mean()),
        "length": float(lengths.mean()),
        "unended": sum(not answer.ended for answer in answers) / n,
        "repetition": sum(repetition(answer.ids) for answer in answers) / n,
        "distinct": len({tuple(answer.ids) for answer in answers}) / n,
        "answers": n,
    }


def repetition(ids: Sequence[int], n: int = 2) -> float:
    """Share of an answer's n-grams that stood in it before: 0 when all differ, or there is at most one."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def settled(rollout: Rollout, how: RLConfig, values: Tensor | None = None) -> Rollout:
    """With advantages: GAE over ``values`` [N, P] for PPO (KL in the reward, token by token), or relative to
    the group's mean for GRPO (KL of the whole answer).
    """
    mask = rollout.sequences.mask
    kl = kl_k1(rollout.old_logp, rollout.ref_logp) * mask * (how.beta if how.kl_in == "reward" else 0.0)
    if values is None:
        scores = rollout.reward - kl.sum(dim=1)
        each = grpo_advantages(scores, how.group, scale=how.scale)
        return replace(rollout, advantages=each[:, None] * mask)
    rewards = -kl
    # A row's last prediction that counts is of its last token.
    rewards[torch.arange(len(mask), device=mask.device), rollout.sequences.last - 1] += rollout.reward
    values = values.float() * mask
    advantages, returns = gae(rewards, values, mask, gamma=how.gamma, lam=how.lam)
    explained = {"explained_variance": float(explained_variance(values, returns, mask))}
    advantages = masked_whiten(advantages, mask) if how.whiten else advantages
    return replace(
        rollout, advantages=advantages, returns=returns, values=values, row=rollout.row | explained
    )


@torch.no_grad()
def critic(policy: Policy, rows: Sequences, batch_size: int = 64) -> Tensor:
    """The value head's view [N, P] of answers' positions, so many rows at a time."""
    assert policy.value is not None
    out = torch.zeros_like(rows.mask)
    for start in range(0, len(rows.tokens), batch_size):
        at = torch.arange(start, min(start + batch_size, len(rows.tokens)), device=rows.tokens.device)
        some = rows.take(at)
        there = some.mask.bool()
        values = policy.value(hidden_at(policy.gpt, some.tokens[:, :-1], there))[:, 0].float()
        out[at, : some.mask.shape[1]] = torch.zeros_like(some.mask).masked_scatter(there, values)
    return out


def minibatch(rollout: Rollout, step: int, how: RLConfig) -> Rollout:
    """The rows of ``step``: every epoch deals the answers into minibatches in a seeded order of its own."""
    if how.minibatches == 1:
        return rollout
    epoch, part = divmod(step - rollout.first, how.minibatches)
    n = len(rollout.reward)
    order = generator("minibatch", how.seed, rollout.first, epoch).permutation(n)
    size = n // how.minibatches
    rows = torch.from_numpy(order[part * size : (part + 1) * size].copy()).to(rollout.reward.device)
    return rollout.take(rows)


__all__ = ["Rollout", "collect", "critic", "minibatch", "read", "repetition", "sampled", "settled"]
