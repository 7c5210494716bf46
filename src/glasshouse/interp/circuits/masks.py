"""Mask optimisation: gates on all edges (or nodes), trained to close while the behaviour stays.

Subnetwork probing (Cao et al. 2021, arXiv 2104.03514) and Edge Pruning (Bhaskar et al. 2024,
arXiv 2406.16778) with hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312); or sigmoid gates. The
model's weights are never touched.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.interp.circuits.patcher import Patcher

# Louizos et al. 2018, sec. 3: the gate's stretch beyond [0, 1] and its temperature.
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2.0 / 3.0


def optimise_masks(
    patcher: Patcher,
    *,
    gate: Literal["hard-concrete", "sigmoid"] = "hard-concrete",
    level: Literal["edge", "node"] = "edge",
    penalty: float = 1.0,
    steps: int = 200,
    rate: float = 0.1,
    samples: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """The chance [edge] that each gate is open after training: the edges' scores.

    Loss: mean over rows and ``samples`` drawn masks of |metric(whole model) - metric(masked)|, as a share of
    the gap between whole and empty, plus ``penalty`` times the expected share of open gates. Adam at ``rate``
    for ``steps`` updates; gates begin nearly open. ``level`` node: one gate for all edges of a writer.
    Sigmoid gates are not drawn but used as they stand. UsageError for other choices and training that
    diverges.
    """
    for given, known in ((gate, ("hard-concrete", "sigmoid")), (level, ("edge", "node"))):
        if given not in known:
            raise UsageError(f"no choice {given!r}.{suggest(given, known)} There are {', '.join(known)}")
    graph = patcher.graph
    writer = torch.from_numpy(graph.pairs[:, 0].copy())
    gates = len(graph.edges) if level == "edge" else len(graph.writers)
    logits = torch.full((gates,), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    noise = torch.Generator().manual_seed(seed)
    share = torch.bincount(writer).double() / len(writer) if level == "node" else None
    for step in range(steps):
        drawn = _drawn(logits, samples if gate == "hard-concrete" else 1, gate, noise)
        keep = graph.tensor(drawn if level == "edge" else drawn[:, writer]).to(patcher.live)
        metric = patcher.metric(keep)
        missed = (patcher.clean.to(metric) - metric).abs().mean() / abs(patcher.gap)
        chance = open_chance(logits, gate)
        density = chance.mean() if share is None else (chance * share.to(chance)).sum()
        loss = missed + penalty * density.to(missed.device)
        if not torch.isfinite(loss):
            raise UsageError(f"mask training diverged at step {step}; lower rate (now {rate})")
        logits.grad = torch.autograd.grad(loss, logits)[0]  # and none for the model's weights
        optimizer.step()
    chances = open_chance(logits.detach(), gate).double().numpy()
    return chances if level == "edge" else chances[graph.pairs[:, 0]]


def open_chance(logits: Tensor, gate: str) -> Tensor:
    """The chance that a hard-concrete gate is not zero (Louizos et al. 2018, eq. 12), or the sigmoid."""
    if gate == "sigmoid":
        return logits.sigmoid()
    shift: float = TEMPERATURE * float(np.log(-LOW / HIGH))
    return (logits - shift).sigmoid()


def _drawn(logits: Tensor, samples: int, gate: str, noise: torch.Generator) -> Tensor:
    """Gates [samples, gate] in [0, 1]; gradients reach the logits."""
    if gate == "sigmoid":
        return logits.sigmoid().expand(samples, -1)
    u = torch.rand(samples, len(logits), generator=noise).clamp(1e-6, 1 - 1e-6)
    s = ((u.logit() + logits) / TEMPERATURE).sigmoid()
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
