"""Optimiser and update of dictionaries: what the loop does, in a function of its own."""

from __future__ import annotations

import math

import torch

from glasshouse.base.errors import TrainingError
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary
from glasshouse.interp.dictionaries.losses import dictionary_loss
from glasshouse.train.objective import Loss, autocast

CLIP_NORM = 1.0


def dictionary_optimizer(
    model: Dictionary, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Adam:
    """Adam in one fused kernel, no weight decay: rows of the decoder are normalised instead."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=betas, eps=eps, fused=True)


def dictionary_step(
    model: Dictionary,
    batch: ActivationBatch,
    optimizer: torch.optim.Optimizer,
    *,
    dtype: str = "fp32",
    clip_norm: float | None = CLIP_NORM,
) -> Loss:
    """One update: loss, gradient, decoder projection, clipping to ``clip_norm``, Adam, unit rows.

    ``dtype`` "bf16" chooses features by bf16 products (worth it where the CPU has them:
    `train.precision.bf16_instructions`). Raises TrainingError, with no parameter changed, when the loss is
    not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(dtype, model.device):
        loss = dictionary_loss(model, batch)
    if not math.isfinite(float(loss.total.detach())):
        raise TrainingError("the dictionary's loss is not finite; lower the learning rate")
    torch.autograd.backward(loss.total)
    model.project_gradient()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    model.constrain()
    return loss
