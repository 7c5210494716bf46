"""Probes trained by gradient: a small MLP (an upper bound) and attention pooled over positions.

Both are deterministic for a seed, leave torch's global generator alone, and are plain tensors when done.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.rng import seed_from
from glasshouse.interp.probes.rows import Bools, Floats

Tensors = dict[str, Tensor]
BATCH = 512  # rows in a step; smaller data sets are taken whole


def mlp_scores(p: Tensors, x: Tensor) -> Tensor:
    """Log-odds [n] of standardised activations [n, d] by one hidden layer of rectified units."""
    return F.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def attention_scores(p: Tensors, x: Tensor, mask: Tensor) -> Tensor:
    """Log-odds [n] of standardised activations [n, pos, d]: values [n, pos, head] weighted by attention.

    Each head has a query and a value: ``sum_p softmax_p(q x_p) v x_p``; heads add up. ``mask`` bool [n, pos]
    says which positions are read. The attention probe of McKenzie et al. 2025, arXiv 2506.10805.
    """
    weight = (x @ p["query"]).masked_fill(~mask[..., None], -torch.inf).softmax(1)  # [n, pos, head]
    return (weight * (x @ p["value"])).sum((1, 2)) + p["bias"]


def fit_mlp(x: Floats, y: Bools, hidden: int, steps: int, lr: float, decay: float, seed: int) -> Tensors:
    """Parameters of ``mlp_scores`` for standardised ``x`` [n, d]."""
    generator = torch.Generator().manual_seed(seed_from("probe mlp", seed))
    d = x.shape[1]
    p = {
        "w1": torch.randn(d, hidden, generator=generator) * (2 / d) ** 0.5,
        "b1": torch.zeros(hidden),
        "w2": torch.randn(hidden, generator=generator) * hidden**-0.5,
        "b2": torch.zeros(()),
    }
    data = torch.from_numpy(x).float()
    return _train(p, lambda rows: mlp_scores(p, data[rows]), y, steps, lr, decay, generator)


def fit_attention(
    x: Floats, y: Bools, mask: Bools, heads: int, steps: int, lr: float, decay: float, seed: int
) -> Tensors:
    """Parameters of ``attention_scores`` for standardised ``x`` [n, pos, d]."""
    generator = torch.Generator().manual_seed(seed_from("probe attention", seed))
    d = x.shape[2]
    p = {
        "query": torch.randn(d, heads, generator=generator) * 0.1 * d**-0.5,
        "value": torch.randn(d, heads, generator=generator) * 0.1 * d**-0.5,
        "bias": torch.zeros(()),
    }
    data, read = torch.from_numpy(x).float(), torch.from_numpy(mask)
    return _train(p, lambda rows: attention_scores(p, data[rows], read[rows]), y, steps, lr, decay, generator)


def _train(
    p: Tensors,
    scores: Callable[[Tensor], Tensor],
    y: Bools,
    steps: int,
    lr: float,
    decay: float,
    generator: torch.Generator,
) -> Tensors:
    """AdamW on the log-loss, classes weighed as they come, rate falling linearly to zero."""
    labels, n = torch.from_numpy(np.asarray(y, dtype=np.float32)), len(y)
    with torch.enable_grad():
        for tensor in p.values():
            tensor.requires_grad_(True)
        matrices = [t for t in p.values() if t.ndim]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay},
             {"params": [t for t in p.values() if not t.ndim], "weight_decay": 0.0}], lr=lr
        )  # fmt: skip
        for step in range(steps):
            rows = torch.arange(n) if n <= BATCH else torch.randperm(n, generator=generator)[:BATCH]
            loss = F.binary_cross_entropy_with_logits(scores(rows), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.step()
    return {name: tensor.detach() for name, tensor in p.items()}
