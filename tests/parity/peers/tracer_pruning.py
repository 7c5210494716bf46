"""What circuit-tracer makes of a random graph: the fixture of tests/interp/circuits.

Run in an environment that has the package: ``python tracer_pruning.py tests/interp/circuits/fixtures``.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from circuit_tracer.graph import compute_graph_scores, prune_graph
from torch import Tensor

N_POS, N_LAYER, A_LAYER = 3, 3, 5  # tokens, layers, features in each
OUTPUTS = torch.tensor([0.625, 0.25])


def random_weights(seed: int) -> Tensor:
    """Weights of features, errors, tokens and outputs, in circuit-tracer's order; heavy tails, many zeros."""
    generator = torch.Generator().manual_seed(seed)
    features, errors, last = N_LAYER * A_LAYER, N_LAYER * N_POS, len(OUTPUTS)
    layer = torch.cat([
        torch.arange(features) // A_LAYER, torch.arange(errors) // N_POS,
        torch.full((N_POS,), -1), torch.full((last,), N_LAYER),
    ])  # fmt: skip
    weights = torch.zeros(len(layer), len(layer))
    for target in [*range(features), *range(len(layer) - last, len(layer))]:
        sources = layer < layer[target]
        n = int(sources.sum())
        drawn = torch.randn(n, generator=generator) ** 3 * (torch.rand(n, generator=generator) < 0.7)
        weights[target, sources] = (drawn * 1000).round() / 1000
    return weights


def judged(weights: Tensor) -> dict[str, Any]:
    """The weights, and circuit-tracer's prunings and scores of them."""
    graph = SimpleNamespace(
        input_tokens=torch.arange(N_POS), selected_features=torch.arange(N_LAYER * A_LAYER),
        logit_targets=[0, 1], adjacency_matrix=weights, logit_probabilities=OUTPUTS,
        cfg=SimpleNamespace(n_layers=N_LAYER),
    )  # fmt: skip
    pruned = []
    for nodes, edges in ((0.8, 0.98), (0.6, 0.8), (0.95, 0.9)):
        found = prune_graph(graph, nodes, edges)
        pruned.append({
            "node_threshold": nodes, "edge_threshold": edges,
            "nodes": found.node_mask.nonzero()[:, 0].tolist(), "edges": found.edge_mask.nonzero().tolist(),
            "reached": [round(x, 6) for x in found.cumulative_scores.tolist()],
        })  # fmt: skip
    replacement, completeness = (round(float(x), 6) for x in compute_graph_scores(graph))
    return {
        "source": f"circuit-tracer {version('circuit-tracer')}",
        "n_features": N_LAYER * A_LAYER, "n_errors": N_LAYER * N_POS, "n_tokens": N_POS,
        "outputs": OUTPUTS.tolist(), "weights": [[round(x, 3) for x in row] for row in weights.tolist()],
        "pruned": pruned, "replacement": replacement, "completeness": completeness,
    }  # fmt: skip


if __name__ == "__main__":
    made = json.dumps(judged(random_weights(7)), separators=(",", ":"))
    (Path(sys.argv[1]) / "circuit_tracer_pruning.json").write_text(made + "\n", "utf-8")
