"""circuit-tracer's side: a small random graph by its own writer, and ours read into its own classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tokenizers
import torch
from circuit_tracer import Graph
from circuit_tracer.attribution.targets import LogitTarget
from circuit_tracer.frontend.graph_models import Model, Node
from circuit_tracer.utils.create_graph_files import create_graph_files
from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig
from exchange import main
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "dragon", "soup", "is", "hot", "cold", "red", "old"]
N_LAYER, N_POS = 3, 3


def tokenizer(folder: Path) -> Path:
    """A word-level tokenizer on disk, because the writer loads one by name."""
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model)).save_pretrained(folder)
    return folder


def write(root: Path) -> None:
    # (layer, position, feature); feature 9 and above, so that no error has the name of one in layer 0
    active = torch.tensor([[0, 0, 11], [0, 1, 12], [1, 1, 40], [1, 2, 13], [2, 2, 77], [2, 2, 9]])
    n = len(active) + N_LAYER * N_POS + N_POS + 2
    height = torch.cat([
        active[:, 0], torch.arange(N_LAYER).repeat_interleave(N_POS),
        torch.full((N_POS,), -1), torch.full((2,), N_LAYER),
    ])  # fmt: skip
    place = torch.cat(
        [active[:, 1], torch.arange(N_POS).repeat(N_LAYER), torch.arange(N_POS), torch.full((2,), 2)]
    )
    explained = torch.zeros(n, dtype=torch.bool)
    explained[: len(active)] = explained[-2:] = True
    possible = explained[:, None] & (height[None] < height[:, None]) & (place[None] <= place[:, None])
    graph = Graph(
        input_string="the dragon soup",
        input_tokens=torch.tensor([0, 1, 2]),
        active_features=active,
        adjacency_matrix=torch.randn(n, n) * possible,
        cfg=UnifiedConfig(N_LAYER, 8, 4, 2, 16, len(WORDS), str(tokenizer(root / "tok")), "tiny", "Tiny"),
        selected_features=torch.arange(len(active)),
        activation_values=torch.rand(len(active)),
        logit_targets=[LogitTarget(" hot", 4), LogitTarget(" cold", 5)],
        logit_probabilities=torch.tensor([0.625, 0.25]),
        scan="tiny-transcoders",
    )
    create_graph_files(graph, "tiny", root / "graph", node_threshold=1.0, edge_threshold=1.0)
    (root / "graph" / "graph-metadata.json").unlink()
    for leftover in sorted((root / "tok").iterdir()):
        leftover.unlink()
    (root / "tok").rmdir()
    possible_links = (graph.adjacency_matrix != 0).nonzero().tolist()
    (root / "graph" / "expected.json").write_text(
        json.dumps({"n_possible_links": len(possible_links), "features": active.tolist(), "n_layer": N_LAYER})
    )


def check(root: Path) -> None:
    """Ours, through its classes: every node as its constructors would number it."""
    report = {}
    for path in sorted(root.glob("*.json")):
        model = Model.model_validate_json(path.read_text())
        different = []
        for node in model.nodes:
            if node.feature_type == "cross layer transcoder":
                layer, index, pos = (int(p) for p in node.node_id.split("_"))
                twin = Node.feature_node(layer, pos, index)
                same = (twin.feature, twin.layer, twin.node_id, twin.jsNodeId) == (
                    node.feature, node.layer, node.node_id, node.jsNodeId)  # fmt: skip
                different += [] if same else [node.node_id]
        report[path.stem] = {"nodes": len(model.nodes), "links": len(model.links), "different": different}
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    else:
        main(["circuit-tracer"], write, None)
