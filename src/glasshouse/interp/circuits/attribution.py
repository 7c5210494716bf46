"""Edge attribution: every edge's effect at once, from gradients.

`eap`: edge attribution patching (Syed et al. 2023, arXiv 2310.10348, eq. 2): the gradient of the metric at
each reader's input, dotted with what cutting the edge would take from it. `eap_ig`: the gradient is averaged
on the way from the ablated to the clean run (Hanna et al. 2024, arXiv 2403.17806, sec. 3), which helps where
a metric or an attention pattern is flat at the clean run. All approximate metric(clean) - metric(edge cut).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.circuits.split import Stream

NUMBERS_AT_ONCE = 2**26  # of the inputs whose gradients one pass holds


def eap(patcher: Patcher) -> np.ndarray:
    """First-order effect [edge] of cutting each edge, mean over rows: one pass forward and back."""
    total = torch.zeros(patcher.graph.valid.shape, dtype=torch.float64)
    for rows in _chunks(patcher, 1):
        total += _products(patcher, _input_gradients(patcher, rows, None), rows)
    return _by_edge(patcher, total / len(patcher))


def eap_ig(
    patcher: Patcher, steps: int = 5, along: Literal["inputs", "activations"] = "inputs"
) -> np.ndarray:
    """Effect [edge] with gradients averaged over ``steps`` points between the ablated and the clean run.

    ``along`` inputs: the embeddings move, all else follows; ``steps`` passes. ``along`` activations: one
    node's output moves at a time while the others stay clean, and an edge uses the path of its own writer
    (the released code averages over the paths of all writers); ``steps`` passes a node. Points are the
    middles of equal parts of the way, where the released code takes one end of each: the error of the
    integral falls with the square of ``steps``. UsageError for other values.
    """
    if steps < 1:
        raise UsageError(f"the way needs one step or more, not {steps}")
    if along not in ("inputs", "activations"):
        raise UsageError(f"no way along {along!r}.{suggest(along, ['inputs', 'activations'])}")
    total = torch.zeros(patcher.graph.valid.shape, dtype=torch.float64)
    points = (torch.arange(steps) + 0.5) / steps
    if along == "inputs":
        for rows in _chunks(patcher, 1):
            for point in points.tolist():
                total += _products(patcher, _input_gradients(patcher, rows, point), rows) / steps
    else:
        for rows in _chunks(patcher, steps):
            for writer in range(len(patcher.graph.writers)):
                grads, skipped = _path_gradients(patcher, rows, writer, points)
                change = _change(patcher, rows)[writer].flatten()
                total[writer, skipped:] += (grads.flatten(1) @ change).double().cpu()
    return _by_edge(patcher, total / len(patcher))


def _chunks(patcher: Patcher, copies: int) -> list[Tensor]:
    """Row numbers in parts whose gradients fit."""
    one = len(patcher.graph.readers) * patcher.live[0, 0].numel() * copies
    return list(torch.arange(len(patcher)).split(max(1, NUMBERS_AT_ONCE // max(1, one))))


def _change(patcher: Patcher, rows: Tensor) -> Tensor:
    """What cutting a writer's edges takes away [W, rows, T, D]."""
    return patcher.live[:, rows] - patcher.alternative[:, rows]


def _products(patcher: Patcher, grads: Tensor, rows: Tensor) -> Tensor:
    """[W, R] of gradients [R, rows, T, D] and what each writer's edges would lose, summed over rows."""
    return (_change(patcher, rows).flatten(1) @ grads.flatten(1).T).double().cpu()


def _by_edge(patcher: Patcher, table: Tensor) -> np.ndarray:
    w, r = patcher.graph.pairs.T
    scores: np.ndarray = table.numpy()[w, r]
    if not np.isfinite(scores).all():
        bad = patcher.graph.edges[int((~np.isfinite(scores)).argmax())]
        raise UsageError(f"the gradient at {bad} is not a finite number; check the model and the metric")
    return scores


def _input_gradients(patcher: Patcher, rows: Tensor, point: float | None) -> Tensor:
    """d metric / d input of every reader [R, rows, T, D]; ``point``: how far embeddings are moved from the
    ablated (0) to the clean run (1, or None).
    """
    graph, split = patcher.graph, patcher.split
    with torch.no_grad():
        first, rest = split.embed(patcher.tokens[rows], patcher.past)
        if point is not None:
            first = patcher.alternative[: graph.first, rows].lerp(first, point)
    nudges = first.new_zeros(len(graph.readers), *first.shape[1:], requires_grad=True)
    with torch.enable_grad():
        prefix = patcher.prefix_of(rows)
        final = split.run(Stream(nudges), (first, rest), patcher.length, prefix=prefix)
        metric = patcher.contrast.metric(patcher.unembed(final, rows), rows).sum()
        return torch.autograd.grad(metric, nudges)[0]


def _path_gradients(patcher: Patcher, rows: Tensor, writer: int, points: Tensor) -> tuple[Tensor, int]:
    """Mean over ``points`` of d metric / d input [later readers, rows, T, D], while one writer's output moves
    from the ablated to the clean run; and how many readers are not later.
    """
    graph, split, n = patcher.graph, patcher.split, len(rows)
    start = graph.heard_from(writer)
    skipped = graph.first_reader(start)
    with torch.no_grad():
        stream = patcher.live[: graph.written_at(start), rows].sum(0)
        for rest in patcher.rests[: 1 + (start + 1) // 2]:
            stream = stream + (rest[rows] if rest.ndim == 3 else rest)
        back = (points.to(stream) - 1).view(-1, 1, 1, 1) * _change(patcher, rows)[writer]
        moved = (stream + back).flatten(0, 1)  # [steps * rows, T, D]
    nudges = moved.new_zeros(len(graph.readers) - skipped, *moved.shape, requires_grad=True)
    feed = Stream(nudges, skipped)
    feed.total = moved
    numbers = rows.repeat(len(points))
    with torch.enable_grad():
        final = split.run(feed, None, patcher.length, start=start, prefix=patcher.prefix_of(rows))
        metric = patcher.contrast.metric(patcher.unembed(final, numbers), numbers).sum()
        grads = torch.autograd.grad(metric, nudges)[0]
    return grads.unflatten(1, (len(points), n)).mean(1), skipped
