"""Losses of learning from preferences, as pure functions of tensors: no model, no state, no randomness.

Shape legend: N sequences, T answer positions, G answers to one prompt. ``mask`` is 1 (or True) where a
position counts. Log-probabilities are in nats. What is a constant in an equation is detached by the caller,
except where a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-8


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is 1, over everything or over ``dim``; 0 where nothing counts."""
    weight = mask.to(x.dtype)
    # Not x * weight: what is masked may be infinite, and 0 * inf is NaN.
    kept = torch.where(mask.bool(), x, torch.zeros_like(x)) * weight
    if dim is None:
        return kept.sum() / weight.sum().clamp_min(1.0)
    return kept.sum(dim) / weight.sum(dim).clamp_min(1.0)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``x`` with mean 0 and standard deviation 1 over the unmasked entries; masked ones become 0.

    The standard deviation is that of a sample (n - 1). ``shift_mean`` False keeps the mean. A single entry,
    or equal ones, become 0 and not infinite.
    """
    mean = masked_mean(x, mask)
    n = mask.to(x.dtype).sum()
    variance = masked_mean((x - mean).square(), mask) * n / (n - 1).clamp_min(1.0)
    white = (x - mean) * torch.rsqrt(variance + TINY)
    white = white if shift_mean else white + mean
    return torch.where(mask.bool(), white, torch.zeros_like(white))


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats [...] of the distributions with ``logits`` [..., V]."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def bradley_terry(chosen: Tensor, rejected: Tensor, soft_label: Tensor | float = 1.0) -> Tensor:
    """Loss [N] of scores ``chosen`` and ``rejected`` [N]: cross-entropy in nats against the probability
    ``soft_label`` ([N] or one number) that the chosen one is better.

    P(chosen better) = sigmoid(chosen - rejected) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1 with a
    label of 1). A soft label keeps what a judge was unsure of (Bai et al. 2022, arXiv 2212.08073, sec. 4.3).
    """
    return _cross_entropy(chosen - rejected, soft_label)


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    soft_label: Tensor | float = 1.0,
) -> Tensor:
    """Loss [N] from the summed log-probabilities [N] of whole answers under policy and reference.

    -log sigmoid(h), h = beta * ((policy - ref) of chosen - (policy - ref) of rejected) (Rafailov et al. 2023,
    arXiv 2305.18290, eq. 7). ``soft_label`` p gives -p log sigmoid(h) - (1 - p) log sigmoid(-h): p = 1 -
    epsilon for all is the conservative form (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    With labels sigmoid(r_a - r_b) on every pair its minimum is policy ~ ref * exp(r / beta).
    """
    h = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return _cross_entropy(h, soft_label)


def _cross_entropy(logit: Tensor, label: Tensor | float) -> Tensor:
    p = torch.as_tensor(label, dtype=logit.dtype, device=logit.device)
    return -(p * F.logsigmoid(logit) + (1 - p) * F.logsigmoid(-logit))


@dataclass(frozen=True)
class Clipped:
    """A clipped loss (a scalar with a graph) and the share of positions at which clipping was in force."""

    loss: Tensor
    clip_fraction: Tensor


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    over: Literal["tokens", "sequences"] = "tokens",
) -> Clipped:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A), meaned (Schulman et al. 2017, eq. 7).

    All [N, T]; ratio = exp(logp - old_logp). ``clip_high`` None: the same as ``clip``. ``over`` "tokens":
    the mean over all tokens; "sequences": over each answer's tokens first, then over answers (Shao et al.
    2024, eq. 3). Only ``logp`` may carry a gradient. The clip fraction counts tokens whose gradient is cut.
    """
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    free, cut = -ratio * advantages, -bounded * advantages
    loss = mean_over(torch.maximum(free, cut), mask, over)
    return Clipped(loss, masked_mean((cut > free).to(logp.dtype), mask).detach())


def mean_over(x: Tensor, mask: Tensor, over: Literal["tokens", "sequences"]) -> Tensor:
    """Mean of ``x`` [N, T] over all tokens, or over each answer's and then over the answers that have any."""
    if over == "tokens":
        return masked_mean(x, mask)
    there = mask.bool().any(dim=1)
    return masked_mean(masked_mean(x, mask, dim=1), there)


def value_clip(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> Clipped:
    """Half the mean squared error of ``values`` [N, T] against ``returns``; the larger of it and that of
    values kept within ``clip`` of the old ones (the released code of Schulman et al. 2017).
    """
    free = (values - returns).square()
    if clip is None:
        return Clipped(0.5 * masked_mean(free, mask), free.new_zeros(()))
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    cut = (bounded - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(free, cut), mask)
    return Clipped(loss, masked_mean((cut > free).to(values.dtype), mask).detach())


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N, T] of rewards and values [N, T] (Schulman et al. 2016, eq. 16).

    A_t = sum over l of (gamma lam)^l d_(t+l), d_t = r_t + gamma V_(t+1) - V_t; behind an answer's last
    counted position the value is 0: the answer is over. ``mask`` is 1 on a run of positions of each row; what
    lies outside is 0 in both results. returns = advantages + values.
    """
    there = mask.to(values.dtype)
    r, v = rewards * there, values * there
    later_v = torch.zeros_like(v[:, 0])
    later_a = torch.zeros_like(later_v)
    advantages = torch.zeros_like(v)
    for t in range(v.shape[1] - 1, -1, -1):
        here = there[:, t]
        later_a = here * (r[:, t] + gamma * later_v - v[:, t] + gamma * lam * later_a)
        later_v = v[:, t]
        advantages[:, t] = later_a
    return advantages, advantages + v


def grpo_advantages(
    rewards: Tensor, group: int, *, scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Advantage [N] of each answer over the mean of its ``group`` answers (rows of a group stand together).

    Divided by the group's standard deviation of a sample (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2),
    by that of all rewards ("batch"), or by nothing, which does not overweight easy and hard prompts (Liu et
    al. 2025, arXiv 2503.20783). Raises ValueError when N is no multiple of ``group``, or the group is one.
    """
    if group < 2 or rewards.numel() % group:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {group} (at least 2)")
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (grouped.std(dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    return centred.flatten()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the unmasked positions: 1 is a perfect critic, 0 one that
    knows the mean only, below 0 worse. NaN where returns do not vary.
    """
    there = mask.bool()
    of = returns[there]
    spread = of.var(unbiased=False)
    left = (of - values[there]).var(unbiased=False)
    return torch.where(spread > 0, 1 - left / spread.clamp_min(1e-30), torch.full_like(spread, torch.nan))
