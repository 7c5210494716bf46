"""Pre-training with preferences (Korbak et al. 2023, arXiv 2302.08582): objectives that read a row's worth.

What documents are worth is settled before training: `data.values.split` puts them into shards of their own,
and a row's shard (`Batch.rows`) says which it is. A shard whose name ends in ``-bad`` is bad, others are not.
Conditional training and filtering are data steps there and need no objective of their own.

Shape legend: B rows, T positions, M targets with weight > 0, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError
from glasshouse.model import GPT
from glasshouse.train.objective import Loss, Objective, TensorBatch, next_token

BAD = "-bad"  # how the name of a shard of bad documents ends
Worth = Mapping[str, float] | Callable[[str], float]  # of a shard, by its name


def good_or_bad(shard: str) -> float:
    """0 for a shard of bad documents, 1 for any other."""
    return 0.0 if shard.endswith(BAD) else 1.0


def unlikelihood(
    model: GPT, batch: TensorBatch, *, z_loss: float = 0.0, alpha: float = 1.0, worth: Worth = good_or_bad
) -> Loss:
    """Mean over all targets of -log p where the row is good and -alpha log(1 - p) where it is bad.

    Token by token (Welleck et al. 2020, arXiv 1908.04319, eq. 4; Korbak et al. sec. 2, "UL"): a row is bad
    when its shard's worth is 0 or less. A batch without a bad row is `next_token`'s, bit for bit. The
    metrics' nats are the cross-entropy of all targets. UsageError when the batch does not name its rows'
    shards; DataError when no target has weight.
    """
    bad_B = worths(batch, worth) <= 0
    if not bool(bad_B.any()):
        return next_token(model, batch, z_loss=z_loss)
    if z_loss:
        raise UsageError("z_loss has no effect on unlikelihood: take one of the two from the stage")
    weight = batch.weight.flatten()
    chosen_M = weight.nonzero().squeeze(1)
    if chosen_M.numel() == 0:
        raise DataError(f"a batch from {', '.join(batch.shards) or 'unnamed shards'} has no target")
    weight_M, targets_M = weight[chosen_M], batch.targets.flatten()[chosen_M]
    bad_M = bad_B.to(weight.device).repeat_interleave(batch.tokens.shape[1])[chosen_M]
    hidden_MD = model.hidden(batch.tokens).flatten(0, 1).index_select(0, chosen_M)
    logp_M = target_logp(hidden_MD, model.head_weight, targets_M, model.config.logit_softcap)
    count = weight_M.sum()
    said = torch.where(bad_M, torch.zeros_like(logp_M), -logp_M * weight_M).sum() / count
    unsaid_M = torch.where(bad_M, -log_not(torch.where(bad_M, logp_M, logp_M.new_tensor(-1.0))), 0.0)
    unsaid = alpha * (unsaid_M * weight_M).sum() / count
    nats = -(logp_M.detach() * weight_M).sum()
    metrics = {
        "nats": float(nats),
        "targets": float(count),
        "n_bytes": float(batch.n_bytes),
        "tokens": float(batch.tokens.numel()),
    }
    return Loss(said + unsaid, {"lm": said.detach(), "unlikelihood": unsaid.detach()}, metrics)


def reward_weighted(
    model: GPT, batch: TensorBatch, *, z_loss: float = 0.0, beta: float = 1.0, worth: Worth = good_or_bad
) -> Loss:
    """`next_token` with each target's weight times exp(worth of its row / beta), normalised to sum to 1.

    Reward-weighted regression (Peters & Schaal 2007; Korbak et al. sec. 2, "RWR"), normalised over the batch
    (with `accumulate`, over each micro-batch). Where all rows are worth the same it is `next_token`'s, bit
    for bit. Its bits per byte would be of a reweighted text and are unknown.
    """
    worth_B = worths(batch, worth)
    if bool((worth_B == worth_B[0]).all()):
        return next_token(model, batch, z_loss=z_loss)
    by_B1 = ((worth_B - worth_B.max()) / beta).exp().float()[:, None].to(batch.weight.device)
    return next_token(model, replace(batch, weight=batch.weight * by_B1, n_bytes=0), z_loss=z_loss)


# By the names that a stage's `objective` has for them; for `run_stages(objectives=...)`.
OBJECTIVES: dict[str, Objective] = {"unlikelihood": unlikelihood, "reward_weighted": reward_weighted}


def objectives(alpha: float = 1.0, beta: float = 1.0, worth: Worth = good_or_bad) -> dict[str, Objective]:
    """`OBJECTIVES` with other numbers. ValueError for one that is not above 0."""
    if not (alpha > 0 and beta > 0 and math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta lie above 0, not at {alpha} and {beta}")
    return {
        "unlikelihood": partial(unlikelihood, alpha=alpha, worth=worth),
        "reward_weighted": partial(reward_weighted, beta=beta, worth=worth),
    }


def worths(batch: TensorBatch, worth: Worth) -> Tensor:
    """What each row [B] is worth, by its shard. UsageError for rows of unknown or unvalued shards."""
    if len(batch.rows) != len(batch.tokens):
        raise UsageError(
            f"a batch from {', '.join(batch.shards) or 'unnamed shards'} does not say which shard each row "
            "is from (Batch.rows), so nothing says what a row is worth"
        )
    if not callable(worth):
        unknown = sorted(set(batch.rows) - set(worth))
        if unknown:
            raise UsageError(f"the shard {unknown[0]!r} has no worth; known are {', '.join(sorted(worth))}")
        return torch.tensor([float(worth[name]) for name in batch.rows], dtype=torch.float64)
    return torch.tensor([float(worth(name)) for name in batch.rows], dtype=torch.float64)


def target_logp(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, softcap: float | None) -> Tensor:
    """log p [M] of the targets, softmax in fp32. All logits are in memory at once."""
    logits_MV: Any = F.linear(hidden_MD, head_VD).float()
    if softcap is not None:
        logits_MV = softcap * torch.tanh(logits_MV / softcap)
    found: Tensor = -F.cross_entropy(logits_MV, targets_M, reduction="none")
    return found


def log_not(logp: Tensor) -> Tensor:
    """log(1 - p) from log p, exact for small p and finite for p = 1 (held at 1 - 1e-6, with no gradient)."""
    half = -math.log(2)  # each form is exact on its side of p = 1/2 (Maechler 2012, "log(1 - exp(-|a|))")
    small, large = logp.clamp(max=half), logp.clamp(min=half, max=-1e-6)
    return torch.where(logp < half, torch.log1p(-small.exp()), torch.log(-torch.expm1(large)))
