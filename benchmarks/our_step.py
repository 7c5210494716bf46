"""Ours in the training benchmarks: the model of a GPT-2 shape, one training step, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasshouse.base.batch import Batch
from glasshouse.model import GPT, GPTConfig
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import next_token, tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.step import backward


def model_of(shape: dict[str, int], **features: Any) -> GPT:
    """Our model in this shape, newly initialised."""
    config = GPTConfig(
        vocab_size=shape["vocab_size"],
        context=shape["pos"],
        d_model=shape["d_model"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        **features,
    )
    return GPT(config).init_weights(0)


def batch_of(windows: np.ndarray, shard: str) -> Batch:
    """A batch from ``windows`` int64 [rows, pos + 1] in which every token but the first is a target."""
    tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    return Batch(tokens, targets, np.ones(targets.shape, dtype=np.float32), (shard,), targets.size)


def training_step(model: GPT, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    """The functions that `run_stages` calls, with AdamW, again and again on ``ids`` [rows, pos + 1]."""
    stage = StageConfig(name="bench", steps=10_000, batch_size=len(ids), optimizer="adamw", adam_lr=1e-3)
    optimizers, batch = Optimizers(model, stage), batch_of(ids, "random")

    def step() -> None:
        optimizers.zero_grad()
        backward(model, next_token, tensors(batch, model.device), dtype)
        optimizers.clip()
        optimizers.step(1.0)

    return step


def flops(shape: dict[str, int]) -> float:
    """Operations per token of this shape, matrices only: 6 N + 12 L d T."""
    d, layers = shape["d_model"], shape["n_layer"]
    return 6.0 * (12 * layers * d * d + shape["vocab_size"] * d) + 12.0 * layers * d * shape["pos"]
