"""The gradient of one update, over the whole batch at once or in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.model import GPT
from glasshouse.model.compiled import plain_blocks
from glasshouse.train.objective import Loss, Objective, TensorBatch, autocast, tensors


def checked(batch: Batch, model: GPT, where: str) -> TensorBatch:
    """``batch`` as tensors. Raises DataError, naming shards and setting, when it does not fit the model: a
    token outside the vocabulary, or rows longer than the context.
    """
    config = model.config
    largest = max(int(batch.tokens.max()), int(batch.targets.max()))
    smallest = min(int(batch.tokens.min()), int(batch.targets.min()))
    shards = ", ".join(batch.shards) or "unnamed shards"
    if largest >= config.vocab_size or smallest < 0:
        raise DataError(
            f"{where}: a batch from {shards} holds token {largest if smallest >= 0 else smallest}, but the "
            f"model's vocabulary is 0 to {config.vocab_size - 1}: the shards were made with another "
            "tokenizer than the model's; pack them again, or set model.vocab_size to the tokenizer's size"
        )
    if batch.tokens.shape[1] > config.context:
        raise DataError(
            f"{where}: a batch from {shards} has rows of {batch.tokens.shape[1]} tokens, but the model's "
            f"context is {config.context}: pack shorter rows, or set model.context to "
            f"{batch.tokens.shape[1]} in a new run"
        )
    return tensors(batch, model.device)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is."""
    return next(model.parameters()).device


@contextmanager
def plain(model: GPT) -> Iterator[None]:
    """Run uncompiled: other shapes would make compiled blocks compile again, into other kernels."""
    was = model.run_block
    plain_blocks(model)
    try:
        yield
    finally:
        model.run_block = was


def weighted_rows(batch: TensorBatch) -> list[int]:
    """Indices of the rows that have a target to learn from."""
    return [int(i) for i in (batch.weight != 0).any(dim=1).nonzero().flatten()]


def pieces(batch: TensorBatch, n: int) -> Iterator[tuple[TensorBatch, float]]:
    """``batch`` in ``n`` micro-batches of equally many rows, each with its share of the targets' weight.

    The shares add up to one, so the sum of share times mean is the mean over the whole batch. A piece without
    any target is left out: it has no mean and no share.
    """
    whole = float(batch.weight.sum())
    rows = batch.tokens.shape[0] // n
    for start in range(0, rows * n, rows):
        part = slice(start, start + rows)
        weight = batch.weight[part]
        share = float(weight.sum()) / whole if whole else 1.0 / n
        if share or not whole:
            rows_of = batch.rows[part]
            yield (
                TensorBatch(batch.tokens[part], batch.targets[part], weight, 0, batch.shards, rows_of),
                share,
            )


def backward(
    model: nn.Module, objective: Objective, batch: TensorBatch, dtype: str, accumulate: int = 1
) -> Loss:
    """Add the gradient of the mean loss over ``batch`` to the parameters' ``.grad``; return the loss.

    With ``accumulate`` > 1 the rows go through in so many micro-batches, and memory for activations shrinks
    by as much; the gradient is that of the whole batch, because every piece counts by its targets. Stops
    before the backward pass of a loss that is not finite.
    """
    device = device_of(model)
    if accumulate == 1:
        with autocast(dtype, device):
            loss = objective(model, batch)
        if math.isfinite(float(loss.total.detach())):
            torch.autograd.backward(loss.total)
        return loss
    total: Tensor | None = None
    parts: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for piece, share in pieces(batch, accumulate):
        with autocast(dtype, device):
            loss = objective(model, piece)
        scaled = loss.total * share
        total = scaled.detach() if total is None else total + scaled.detach()
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, torch.zeros_like(scaled)).detach() + value.detach() * share
        for key, number in loss.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + number
        if not math.isfinite(float(total)):
            break
        torch.autograd.backward(scaled)
    if total is None:
        raise DataError(f"a batch from {', '.join(batch.shards)} has no target to learn from")
    if "n_bytes" in metrics:
        metrics["n_bytes"] = float(batch.n_bytes)  # known of the whole batch only
    return Loss(total, parts, metrics)
