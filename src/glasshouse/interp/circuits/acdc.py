"""Greedy pruning (ACDC, Conmy et al. 2023, arXiv 2304.14997, sec. 3): from the logits down, an edge whose
removal costs less than a threshold is gone for good.

The algorithm is sequential, but most edges go: so the next candidates are tried in one batch, each with all
before it gone too, and everything up to the first that must stay is taken over. The result is that of the
sequential algorithm, edge for edge.
"""

from __future__ import annotations

import numpy as np
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits.patcher import Patcher

MOST_AT_ONCE = 32


def prune_greedily(patcher: Patcher, threshold: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Which edges stay, bool [edge], and what removing each cost when its turn came, float [edge].

    The cost is a share of the gap between the whole model's mean metric and that of the model with every edge
    cut, so that one ``threshold`` serves any metric. Readers go from the logits to the first layer, a
    reader's writers from the last to the first. UsageError for a threshold that is not positive.
    """
    if not threshold > 0:
        raise UsageError(f"the threshold must be positive, not {threshold}: at 0 rounding decides")
    graph = patcher.graph
    kept, cost = np.ones(len(graph.edges), dtype=bool), np.zeros(len(graph.edges))
    current = float(patcher.clean.double().mean())
    order = np.lexsort((-graph.pairs[:, 0], -graph.pairs[:, 1]))
    at, width = 0, 1
    while at < len(order):
        candidates = order[at : at + width]
        sets = np.repeat(kept[None], len(candidates), axis=0)
        for i, edge in enumerate(candidates):
            sets[i:, edge] = False
        for edge, value in zip(candidates, _means(patcher, sets), strict=True):
            cost[edge] = (current - value) / patcher.gap
            at += 1
            if cost[edge] >= threshold:
                width = max(1, width // 2)
                break
            kept[edge], current = False, value
        else:
            width = min(2 * width, MOST_AT_ONCE)
    return kept, cost


def _means(patcher: Patcher, sets: np.ndarray) -> list[float]:
    found: list[float] = patcher.measure(sets).to(torch.float64).mean(1).tolist()
    return found
