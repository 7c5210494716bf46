"""MIB's side: EAP-IG's ``Graph``, from its source folder, in the environment of TransformerLens."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, sys.argv[3])

import torch

# Its drawing module wants graph libraries that neither reading nor writing needs.
drawing = types.ModuleType("eap.visualization")
drawing.get_color = drawing.generate_random_color = None  # type: ignore[attr-defined]
sys.modules["eap.visualization"] = drawing

from eap.graph import Graph  # noqa: E402
from exchange import main  # noqa: E402

CASES = {
    "serial": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "parallel": {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": True, "d_model": 8},
}
GPT2 = {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": False, "d_model": 768}


def write(root: Path) -> None:
    for seed, (name, cfg) in enumerate(CASES.items()):
        graph = Graph.from_model(cfg)
        generator = torch.Generator().manual_seed(seed)
        graph.scores = torch.randn(graph.scores.shape, generator=generator) * graph.real_edge_mask
        for pruned in (True, False):
            graph.apply_topn(12, prune=pruned)
            graph.to_json(str(root / f"{name}{'' if pruned else '_unpruned'}.json"))
    graph = Graph.from_model(GPT2)
    (root / "gpt2.txt").write_text(f"{len(graph.nodes)} {len(graph.edges)}")


def check(root: Path) -> None:
    """Ours through ``from_json``: the edges and nodes it finds in the circuit."""
    report = {}
    for path in sorted(root.glob("*.json")):
        graph = Graph.from_json(str(path))
        report[path.stem] = {
            "edges": {name: [edge.score.item(), bool(edge.in_graph)] for name, edge in graph.edges.items()},
            "nodes": {name: bool(node.in_graph) for name, node in graph.nodes.items()},
        }
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    else:
        main(["transformer-lens"], write, None)
