"""PPO and GRPO through the one loop: a `Trainee` that draws answers, and the two objectives.

    policy = Policy(gpt, critic=True)
    how = RLConfig(method="ppo", max_new_tokens=24, stop=(end,), beta=0.05, kl_at_most=30.0)
    stage = Stage(config, prompt_batches(shards, config, how), prompt_plan(shards))
    run_stages(lambda: policy, [stage], trainee=PolicyTrainee(how, reward), objectives=OBJECTIVES, ...)

One step of the loop is one update. At the first of a rollout's updates answers are drawn (seeded by
(seed, step, answer)), rewarded and compared with the reference; the others learn from the same answers, which
a checkpoint between them holds. So a run killed anywhere goes on bit for bit.

With one update per rollout nothing is read twice: the generator's own log-probabilities are the old ones, and
the update's forward pass gives the values that advantages are made from. Only the reference needs a pass of
its own, in batches and without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glasshouse.align.collect import Rollout, collect, critic, minibatch, settled
from glasshouse.align.dpo import dpo_loss
from glasshouse.align.files import PolicyFiles, without_critic
from glasshouse.align.heldout import HeldOut
from glasshouse.align.kl import kl_k3
from glasshouse.align.losses import masked_mean, mean_over, ppo_clip, value_clip
from glasshouse.align.policy import Policy, Prompts, RLConfig
from glasshouse.align.reward import Reward, reward_loss
from glasshouse.align.rollout import Embedded, Rollouts
from glasshouse.align.sequences import Entropy, read
from glasshouse.align.watch import Online, ProxyParted
from glasshouse.base.errors import UsageError
from glasshouse.train import Loss
from glasshouse.train.objective import Objective, autocast
from glasshouse.train.optim import Optimizers
from glasshouse.train.trainee import LANGUAGE


@dataclass(frozen=True)
class Update:
    """A minibatch of a rollout. ``notes``: numbers for the log, filled in by the objective."""

    rollout: Rollout
    how: RLConfig
    shards: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def _wanted(how: RLConfig) -> Entropy:
    return "gradient" if how.entropy_coef > 0 else "number"


def ppo(model: Policy, batch: Update) -> Loss:
    """Objective "ppo": clipped policy loss, ``value_coef`` times the clipped value loss, less the entropy's
    share (Schulman et al. 2017, eq. 9).
    """
    if model.value is None:
        raise UsageError("ppo needs a critic: build the policy with critic=True")
    how, rollout = batch.how, batch.rollout
    seen = read(model.gpt, rollout.sequences, entropy=_wanted(how))
    mask = rollout.sequences.mask
    values = torch.zeros_like(mask).masked_scatter(mask.bool(), model.value(seen.hidden)[:, 0].float())
    if rollout.values is None:
        rollout = settled(rollout, how, values.detach())
    assert rollout.values is not None and rollout.returns is not None
    missed = value_clip(values, rollout.values, rollout.returns, mask, clip=how.value_clip)
    parts = {"value": how.value_coef * missed.loss}
    return _policy_loss(batch, rollout, seen.logp, seen.entropy, parts, {"value_loss": missed.loss})


def grpo(model: Policy, batch: Update) -> Loss:
    """Objective "grpo": clipped policy loss on advantages within groups (Shao et al. 2024, eq. 3)."""
    seen = read(model.gpt, batch.rollout.sequences, entropy=_wanted(batch.how))
    return _policy_loss(batch, batch.rollout, seen.logp, seen.entropy, {}, {})


def _policy_loss(
    batch: Update,
    rollout: Rollout,
    logp: Tensor,
    entropy: Tensor,
    parts: dict[str, Tensor],
    notes: dict[str, Tensor],
) -> Loss:
    how, mask = batch.how, rollout.sequences.mask
    assert rollout.advantages is not None
    clipped = ppo_clip(
        logp,
        rollout.old_logp,
        rollout.advantages,
        mask,
        clip=how.clip,
        clip_high=how.clip_high,
        over=how.over,
    )
    spread = masked_mean(entropy, mask)
    parts = {"policy": clipped.loss, **parts}
    if how.kl_in == "loss" and how.beta:
        parts["kl"] = how.beta * mean_over(kl_k3(logp, rollout.ref_logp), mask, how.over)
    if how.entropy_coef:
        parts["entropy"] = -how.entropy_coef * spread
    total = torch.stack(list(parts.values())).sum()
    moved = masked_mean(kl_k3(logp.detach(), rollout.old_logp), mask)
    notes |= {"entropy": spread, "clip_fraction": clipped.clip_fraction, "moved": moved}
    batch.notes.update(rollout.row | {name: float(x.detach()) for name, x in notes.items()})
    metrics = {"reward": batch.notes["reward"], "kl": batch.notes["kl"], "tokens": float(mask.sum())}
    return Loss(total, parts, metrics)


OBJECTIVES: dict[str, Objective] = {"ppo": ppo, "grpo": grpo, "dpo": dpo_loss, "reward": reward_loss}


class PolicyTrainee(PolicyFiles):
    """How `train.run_stages` trains a `Policy`. ``probes`` are measured on every rollout's answers and never
    learnt from ("evasive", ...); ``held_out`` on answers to prompts of its own; ``watch`` reads both as they
    come. Their numbers stand in the rows of kind "rl", which come every ``monitor_every`` steps.
    ``rollouts``: None for this process; whoever gave one closes it.
    """

    def __init__(
        self,
        how: RLConfig,
        reward: Reward,
        *,
        probes: Mapping[str, Reward] | None = None,
        held_out: HeldOut | None = None,
        watch: Online | None = None,
        rollouts: Rollouts | None = None,
    ):
        if how.on_flag == "stop" and watch is None:
            raise UsageError("on_flag = 'stop' needs a watch: give PolicyTrainee(watch=Online())")
        self.how, self.reward, self.held_out, self.watch = how, reward, held_out, watch
        self.probes, self.rollouts = dict(probes or {}), rollouts or Embedded()
        self.dtype = "fp32"

    def prepare(self, model: Policy, dtype: str, compile: str) -> None:
        """Forget the last stage's rollout. Rows have many widths, so blocks are never compiled."""
        if self.how.method == "ppo" and model.value is None:
            raise UsageError("ppo needs a critic: build the policy with critic=True")
        if self.how.method == "grpo":
            without_critic(model, "grpo")
        LANGUAGE.prepare(model.gpt, dtype, "off")
        model.rollout, self.dtype = None, dtype

    def batch(self, batch: Prompts, model: Policy, where: str) -> Update:
        """Draw a rollout if the step begins one. Raises as `collect`, and `ProxyParted` for an alarm of the
        watch, before the update."""
        how, first = self.how, batch.step - batch.step % self.how.updates
        rollout = model.rollout
        if rollout is None or rollout.first != first:
            with autocast(self.dtype, model.device):
                rollout = collect(model, batch, how, self.rollouts, self.reward, self.probes, where)
                rollout.row.update(self._measured(model, rollout.row, batch.step, where))
                if how.method == "grpo":
                    rollout = settled(rollout, how)
                elif how.updates > 1:  # else the update's own forward pass gives the values
                    rollout = settled(rollout, how, critic(model, rollout.sequences))
            model.rollout = rollout
        return Update(minibatch(rollout, batch.step, how), how, rollout.shards)

    def _measured(self, model: Policy, row: dict[str, Any], step: int, where: str) -> dict[str, float]:
        """What stands beside a rollout's own numbers: held-out scores, and what the watch says of them."""
        found: dict[str, float] = {}
        if self.held_out is not None and self.held_out.due(step // self.how.updates):
            found = self.held_out.measure(model, self.how, self.rollouts, step, where)
        if self.watch is None:
            return found
        if step == 0:
            self.watch.again([])
        found |= self.watch.take(row | found)
        if found.get("flagged") and self.how.on_flag == "stop":
            raise ProxyParted(
                f"{where}: the reward has parted from what it is for at a distance of {found['d']:.3g} "
                f"(root of nats); {found.get('lost', 0.0):.0%} of the best gain is gone by the fitted curve. "
                "Everything up to here is saved: take a checkpoint before the peak, or mend the reward"
            )
        return found

    def after_update(
        self, model: Policy, optimizers: Optimizers, batch: Update, loss: Loss, step: int
    ) -> None:
        """After a rollout's last update nothing learns from it any more."""
        if (step + 1) % self.how.updates == 0:
            model.rollout = None

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {"reward": loss.metrics["reward"], "kl": loss.metrics["kl"]}
