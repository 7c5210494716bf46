"""What in a weighted graph matters for its outputs: influence, scores, and the part worth looking at.

Ameisen et al. (2025, "Circuit Tracing", transformer-circuits.pub, "Attribution graphs" and its appendix on
pruning): with A the absolute weights, each target's inputs scaled to sum to 1, a node's influence on the
outputs is the sum over all paths, w (A + A^2 + A^3 + ...), w being how much each output counts. The graph has
no cycles, so the series ends.

Weights [N, N] are target by source; all tensors are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError


def shares(weights: Tensor) -> Tensor:
    """Absolute weights [N, N], each row scaled to sum to 1; rows of zeros stay."""
    size = weights.abs()
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 0.0)


def paths(matrix: Tensor, start: Tensor) -> Tensor:
    """``start`` (M + M^2 + ...) of an acyclic ``matrix`` [N, N] and rows [..., N]."""
    total, now = torch.zeros_like(start), start
    for _ in range(len(matrix)):
        now = now @ matrix
        if not now.any():
            return total
        total = total + now
    raise UsageError("the graph has a cycle: influence along its paths has no end")


def influence(weights: Tensor, outputs: Tensor) -> Tensor:
    """Each node's influence [N] on the outputs, which count as ``outputs`` [N] says."""
    return paths(shares(weights), outputs)


def covering(scores: Tensor, share: float) -> Tensor:
    """The fewest entries, bool like ``scores``, that hold ``share`` of the sum; zeros are never in."""
    if not 0 < share <= 1:
        raise UsageError(f"a threshold is a share of all influence, above 0 and at most 1; got {share}")
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)
    reached = flat[order].cumsum(0)
    needed = int((reached < share * reached[-1] * (1 - 1e-12)).sum()) + 1
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order[:needed]] = True
    return (kept & (flat > 0)).view_as(scores)


def reached(scores: Tensor) -> Tensor:
    """The share [N] of the whole that is reached when entries are taken from the largest down to each."""
    order = scores.argsort(descending=True, stable=True)
    running = scores[order].cumsum(0) / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.empty_like(scores).scatter(0, order, running).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Kinds:
    """Which nodes are what, each bool [N]. Features and outputs have inputs; tokens and errors have none."""

    tokens: Tensor
    features: Tensor
    errors: Tensor
    outputs: Tensor


def prune(
    weights: Tensor, outputs: Tensor, kinds: Kinds, node_share: float, edge_share: float
) -> tuple[Tensor, Tensor]:
    """Nodes bool [N] and edges bool [N, N] that hold these shares of the influence.

    Tokens and outputs always stay. An edge counts by its target's influence (of the graph pruned to the
    nodes) times its share of the target's inputs. Features that then explain nothing or are explained by
    nothing go, and errors that explain nothing.
    """
    nodes = covering(influence(weights, outputs), node_share) | kinds.tokens | kinds.outputs
    inner = weights * (nodes[:, None] & nodes)
    reach = influence(inner, outputs) + outputs
    edges = covering(shares(inner) * reach[:, None], edge_share)
    while True:
        without = kinds.features & ~(edges.any(0) & edges.any(1)) | kinds.errors & ~edges.any(0)
        if not (nodes & without).any():
            return nodes, edges
        nodes = nodes & ~without
        edges = edges & nodes & nodes[:, None]


def replacement(weights: Tensor, outputs: Tensor, kinds: Kinds) -> float:
    """The share of the influence that ends in tokens and not in errors: how much of the way is explained."""
    found = influence(weights, outputs)
    tokens, errors = float(found[kinds.tokens].sum()), float(found[kinds.errors].sum())
    return tokens / (tokens + errors) if tokens + errors > 0 else 0.0


def completeness(weights: Tensor, outputs: Tensor, kinds: Kinds) -> float:
    """The share of inputs that are not errors, averaged over the nodes that have inputs, by influence.

    circuit-tracer's average runs over tokens and errors too, which have no inputs and count as explained;
    this one leaves them out and is the lower of the two.
    """
    incoming = shares(weights)
    counts = (influence(weights, outputs) + outputs) * (incoming.sum(1) > 0)
    explained = incoming[:, ~kinds.errors].sum(1)
    total = float(counts.sum())
    return float((counts * explained).sum()) / total if total > 0 else 0.0
