"""Both directions of every format: what we make of their files, and files of ours for them to read.

Used by the run against the real packages (``run_peers``) and by the tests that read what that run kept.
A case is a folder as ``peers/exchange.py`` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.formats import (
    AttributionGraph,
    CircuitFile,
    Explanation,
    GraphLink,
    GraphNode,
    ScoredEdge,
    Shape,
    Source,
    feature_pages,
    read_circuit,
    read_dictionary_learning,
    read_graph,
    read_saelens,
    read_sparsify,
    write_circuit,
    write_graph,
    write_pages,
    write_saelens,
    write_source,
    write_sparsify,
)
from glasshouse.model import GPT, GPTConfig

FIXTURES = Path(__file__).parent / "fixtures"
CLOSE = 1e-5  # fp32, another order of sums
D_IN, D_SAE, D_OUT, K, N = 8, 16, 6, 3, 8
READERS: dict[str, Callable[[Path], Dictionary]] = {
    "saelens": read_saelens,
    "sparsify": read_sparsify,
    "dictlearn": read_dictionary_learning,
}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of ``b`` where that exceeds 1."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


@torch.no_grad()
def of_theirs(peer: str, folder: Path) -> float:
    """How far our reading of their case is from what they computed: of features (in raw units) and output."""
    expected = load_file(folder / "expected.safetensors")
    dictionary = READERS[peer](folder)
    features = dictionary.encode(expected["x"])
    # dictionary_learning's side decodes features, the others run the whole forward pass.
    out = dictionary.decode(features) if peer == "dictlearn" else dictionary(expected["x"])
    return max(distance(features, expected["features"]), distance(out, expected["out"]))


def made(seed: int, **fields: Any) -> Dictionary:
    """A dictionary with every parameter normal, thresholds positive, and activations scaled."""
    config = DictionaryConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        normalize_activations="expected_average_only_in",
        model_digest="ab" * 32,
        **fields,
    )
    dictionary, generator = Dictionary(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(dictionary.named_parameters()):
            x = torch.randn(p.shape, generator=generator) * 0.5
            p.copy_(x.abs() if name == "threshold" else x)
        dictionary.scale_in.fill_(1.75)
        dictionary.scale_out.fill_(0.8 if config.is_transcoder else 1.75)
        if hasattr(dictionary, "topk_threshold"):
            dictionary.topk_threshold.fill_(0.6)
    return dictionary


SITE = "blocks.1.resid_post"
ACROSS = {"d_out": D_OUT, "site": "blocks.1.mlp_in", "site_out": "blocks.1.mlp_out"}
LEVEL = {**ACROSS, "d_out": D_IN}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "saelens": {
        "l1": {"architecture": "l1", "site": SITE},
        "l1_no_b_dec": {"architecture": "l1", "site": SITE, "apply_b_dec_to_input": False},
        "gated": {"architecture": "gated", "site": SITE},
        "topk": {"architecture": "topk", "k": K, "site": SITE},
        "topk_heads": {"architecture": "topk", "k": K, "site": "blocks.1.z"},
        "batchtopk": {"architecture": "batchtopk", "k": K, "site": SITE},
        "matryoshka": {"architecture": "matryoshka", "k": K, "prefixes": (4, D_SAE), "site": SITE},
        "jumprelu": {"architecture": "jumprelu", "site": SITE},
        "transcoder": {"architecture": "l1", **ACROSS},
        "skip_transcoder": {"architecture": "l1", "skip_connection": True, **ACROSS},
        "jumprelu_transcoder": {"architecture": "jumprelu", **ACROSS},
        "jumprelu_skip_transcoder": {"architecture": "jumprelu", "skip_connection": True, **ACROSS},
    },
    "sparsify": {
        "topk": {"architecture": "topk", "k": K, "site": SITE},
        "transcoder": {"architecture": "topk", "k": K, **LEVEL},
        "skip_transcoder": {"architecture": "topk", "k": K, "skip_connection": True, **LEVEL},
    },
}


@torch.no_grad()
def write_ours(peer: str, root: Path) -> None:
    """Our cases for a peer to load: features in raw units, as a file holds them, outputs as before saving."""
    for seed, (name, fields) in enumerate(OURS[peer].items()):
        dictionary, folder = made(seed, **fields), root / name
        (write_saelens if peer == "saelens" else write_sparsify)(folder, dictionary)
        x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(500 + seed))
        features = dictionary.encode(x) / dictionary.scale_in
        save_file({"x": x, "features": features, "out": dictionary(x)}, folder / "expected.safetensors")
        if peer == "saelens" and name in ("l1", "topk"):
            _old_layout(folder, root / f"{name}_layout_of_saelens_5")


def _old_layout(folder: Path, old: Path) -> None:
    """The same dictionary with its facts beside the config, as SAELens wrote them before version 6."""
    old.mkdir()
    for name in ("sae_weights.safetensors", "expected.safetensors"):
        (old / name).write_bytes((folder / name).read_bytes())
    cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
    metadata = cfg.pop("metadata")
    cfg |= {"hook_name": metadata["hook_name"], "model_name": "tiny", "normalize_activations": False}
    k = cfg.pop("k", None)
    cfg.pop("rescale_acts_by_decoder_norm", None)
    cfg |= {"architecture": "standard", "activation_fn_str": "relu" if k is None else "topk"}
    cfg |= {"activation_fn_kwargs": {} if k is None else {"k": k}, "finetuning_scaling_factor": False}
    (old / "cfg.json").write_text(json.dumps(cfg), "utf-8")


def graph_of_ours() -> AttributionGraph:
    """A small graph with every kind of node."""
    nodes = (
        GraphNode("token", 0, 0),
        GraphNode("token", 1, 3),
        GraphNode("feature", 0, 11, 0, activation=1.5, influence=0.25, label="dragons"),
        GraphNode("feature", 1, 2, 1, activation=0.5, influence=0.5),
        GraphNode("error", 1, None, 0, influence=0.75),
        GraphNode("logit", 1, 4, probability=0.625, label=" soup", target=True),
    )
    ends = [(0, 2), (2, 3), (4, 3), (3, 5), (1, 5)]
    links = tuple(GraphLink(nodes[a].name, nodes[b].name, (-1) ** a * 0.5 * (a + 1)) for a, b in ends)
    return AttributionGraph("ours", "tiny", "the soup", ("the", " soup"), 2, nodes, links)


def circuits_of_ours() -> dict[str, CircuitFile]:
    """A circuit of a serial and of a parallel model."""
    path = ("input->a0.h1<v>", "a0.h1->a1.h0<q>", "input->m1", "a1.h0->logits", "m1->logits")
    made = {}
    for name, shape in {"serial": Shape(2, 2, 8), "parallel": Shape(2, 2, 8, parallel=True)}.items():
        edges = {edge: ScoredEdge(0.25 * (i + 1), True) for i, edge in enumerate(path)}
        made[name] = CircuitFile(shape, edges | {"input->m0": ScoredEdge(-2.0, False)}, facts={"n": 8})
    return made


def graph_distance(folder: Path) -> float:
    """Whether our reading of circuit-tracer's file has its features and loses no link: 0, or inf."""
    raw = json.loads((folder / "tiny.json").read_text("utf-8"))
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    graph = read_graph(folder / "tiny.json")
    features = sorted([n.layer, n.pos, n.index] for n in graph.nodes if n.kind == "feature")
    weights = sorted(link.weight for link in graph.links)
    same = (
        features == sorted(expected["features"])
        and weights == sorted(link["weight"] for link in raw["links"])
        and 0 < len(weights) <= expected["n_possible_links"]
        and graph.n_layer == expected["n_layer"]
        and [n.label for n in graph.nodes if n.kind == "logit"] == [" hot", " cold"]
    )
    return 0.0 if same else float("inf")


def circuit_distance(path: Path) -> float:
    """Whether we read what EAP-IG's file says, edge by edge: 0, or inf."""
    raw, circuit = json.loads(path.read_text("utf-8")), read_circuit(path)
    edges = {name: {"score": e.score, "in_graph": e.in_graph} for name, e in circuit.edges.items()}
    nodes = {name: raw["nodes"][name]["in_graph"] for name in raw["nodes"]}
    return 0.0 if circuit.complete and edges == raw["edges"] and circuit.nodes == nodes else float("inf")


def circuit_report_distance(report: Mapping[str, Any]) -> float:
    """Largest difference of scores between our circuits and what EAP-IG read; inf for another flag."""
    worst = 0.0
    for name, circuit in circuits_of_ours().items():
        theirs = report[name]
        if theirs["nodes"] != circuit.nodes or len(theirs["edges"]) != circuit.shape.n_edges:
            return float("inf")
        for edge, (score, inside) in theirs["edges"].items():
            own = circuit.edges.get(edge, ScoredEdge(0.0, False))
            if inside != own.in_graph:
                return float("inf")
            worst = max(worst, abs(score - own.score))
    return worst


def write_our_graphs(root: Path) -> None:
    """Our attribution graph for circuit-tracer's classes."""
    write_graph(root / "ours.json", graph_of_ours())


def write_our_pages(root: Path) -> None:
    """Our feature pages, with all that Neuronpedia's importer asks for, and a graph."""
    config = GPTConfig(vocab_size=13, context=8, d_model=D_IN, n_layer=2, n_head=2)
    source = Source("tiny", "1-res-16", SITE, creator="us")
    rows = torch.randint(13, (6, 5), generator=torch.Generator().manual_seed(0))
    coder = Dictionary(DictionaryConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)).init_weights(0)
    pages = feature_pages(GPT(config).init_weights(0), coder, rows, SITE, range(D_SAE))
    about = {0: Explanation("a description", "np_max-act", "a-model", (("recall_alt", 0.5),))}
    write_pages(root, source, 0, pages, lambda token: f"w{token}", about)
    write_source(root, source, config, data="dice", rows=rows)
    write_our_graphs(root)


def write_our_circuits(root: Path) -> None:
    """Our circuits for EAP-IG."""
    for name, circuit in circuits_of_ours().items():
        write_circuit(root / f"{name}.json", circuit)
