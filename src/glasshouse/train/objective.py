"""Objectives: functions from a model and a batch to a loss. The loop is the same for all of them.

Shape legend: B batch, T position, D d_model, V vocabulary, M targets with weight > 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.model import GPT
from glasshouse.train.crossentropy import linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """``total`` is what is minimised (a scalar with a graph); ``parts`` add up to it; ``metrics`` are for
    the log.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` as tensors: tokens and targets int64 [B, T], weight float32 [B, T]. ``rows``: see there."""

    tokens: Tensor
    targets: Tensor
    weight: Tensor
    n_bytes: int
    shards: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    def take(self, rows: Sequence[int]) -> TensorBatch:
        """Some of the rows. How many bytes their targets stand for is known of the whole only, and is 0."""
        at = list(rows)
        return TensorBatch(
            self.tokens[at],
            self.targets[at],
            self.weight[at],
            0,
            self.shards,
            tuple(self.rows[i] for i in at) if self.rows else (),
        )


# Of a module and what its `Trainee` makes of a batch; those in this file: of a GPT and a TensorBatch.
Objective = Callable[[Any, Any], Loss]


def tensors(batch: Batch, device: torch.device | None = None) -> TensorBatch:
    """Wrap a batch of numpy arrays as tensors on ``device``; a read-only (memory-mapped) array is copied."""
    arrays = (batch.tokens, batch.targets, batch.weight)
    tokens, targets, weight = (torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays)
    tokens, targets, weight = tokens.long(), targets.long(), weight.float()
    if device is not None and device.type != "cpu":
        tokens, targets, weight = (x.to(device, non_blocking=True) for x in (tokens, targets, weight))
    return TensorBatch(tokens, targets, weight, batch.n_bytes, batch.shards, batch.rows)


def next_token(model: GPT, batch: TensorBatch, *, z_loss: float = 0.0) -> Loss:
    """Mean cross-entropy in nats per weighted target; weight 0 masks padding.

    ``z_loss`` times the mean of log(Z)^2 is added, and stands among the parts.
    """
    return _cross_entropy(model, batch, part="lm", z_loss=z_loss)


def sft(model: GPT, batch: TensorBatch, *, z_loss: float = 0.0) -> Loss:
    """`next_token` where the weights select what the assistant wrote: the user's words are read, not
    learned.
    """
    return _cross_entropy(model, batch, part="sft", z_loss=z_loss)


OBJECTIVES: dict[str, Objective] = {"next_token": next_token, "sft": sft}


def _cross_entropy(model: GPT, batch: TensorBatch, part: str, z_loss: float) -> Loss:
    """Weighted mean over the M targets that count; only their logits are formed. Softmax in fp32.

    Raises DataError when no target has weight: a mean of nothing would be NaN, far from its cause.
    """
    weight = batch.weight.flatten()
    chosen_M = weight.nonzero().squeeze(1)
    if chosen_M.numel() == 0:
        raise DataError(
            f"a batch from {', '.join(batch.shards) or 'unnamed shards'} has no target to learn from: "
            "every weight is 0; check that its documents contain answers"
        )
    weight_M, targets_M = weight[chosen_M], batch.targets.flatten()[chosen_M]
    hidden_MD = model.hidden(batch.tokens).flatten(0, 1)
    if chosen_M.numel() < weight.numel():
        hidden_MD = hidden_MD.index_select(0, chosen_M)
    total, nats, square = linear_cross_entropy(
        hidden_MD, model.head_weight, targets_M, weight_M, softcap=model.config.logit_softcap, z_loss=z_loss
    )
    count = weight_M.sum()
    parts = {part: nats / count} | ({"z": z_loss * square / count} if z_loss else {})
    return Loss(total=total / count, parts=parts, metrics=_metrics(nats, weight_M, batch))


def _metrics(nats: Tensor, weight_M: Tensor, batch: TensorBatch) -> dict[str, float]:
    sums = {"nats": float(nats.detach()), "targets": float(weight_M.sum())}
    return {**sums, "n_bytes": float(batch.n_bytes), "tokens": float(batch.tokens.numel())}


def bits_per_byte(nats: float, n_bytes: float) -> float | None:
    """Bits per UTF-8 byte: comparable across tokenizers, unlike loss per token. None when nothing was
    predicted.
    """
    return nats / math.log(2) / n_bytes if n_bytes > 0 else None


def evaluate(
    model: GPT, batches: Iterable[Batch], objective: Objective = next_token, dtype: str = "fp32"
) -> dict[str, float | int | None]:
    """Return {"loss" nats per target, "bpb", "targets", "n_bytes"} over all of ``batches``, without
    gradients.

    Sums first, divides once: unequal batches do not bias the mean. Raises DataError if there is no batch.
    """
    nats = targets = n_bytes = 0.0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(dtype, model.device):
            for batch in batches:
                metrics = objective(model, tensors(batch, model.device)).metrics
                nats, targets = nats + metrics["nats"], targets + metrics["targets"]
                n_bytes += metrics["n_bytes"]
    finally:
        model.train(was_training)
    if targets == 0:
        raise DataError("nothing to validate on: the validation set has no batch; give it more documents")
    return {
        "loss": nats / targets,
        "bpb": bits_per_byte(nats, n_bytes),
        "targets": int(targets),
        "n_bytes": int(n_bytes),
    }


def autocast(dtype: str, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
    """Context in which matrix products run in ``dtype`` ("fp32", "bf16" or "fp8"); weights stay fp32.

    "fp8" is bf16 here: the matrices that multiply in FP8 see to it themselves (`model.float8`).
    """
    if dtype == "fp32":
        return contextlib.nullcontext()
    if dtype in ("bf16", "fp8"):
        return torch.autocast(device.type if device is not None else "cpu", dtype=torch.bfloat16)
    raise ValueError(f"unknown dtype {dtype!r}: expected 'fp32', 'bf16' or 'fp8'")
