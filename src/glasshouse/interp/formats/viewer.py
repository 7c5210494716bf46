"""Attribution graphs as the JSON that circuit-tracer's viewer and Neuronpedia read.

Keys from circuit-tracer 0.5.0 (``frontend/graph_models.py``) and Neuronpedia's ``graph-schema.json``. Two
deliberate differences from circuit-tracer's own files, both invisible to the viewer, for which a node's id is
an opaque text: errors are called ``err_{layer}_{pos}``, because its ``0_{layer}_{pos}`` is also the name of
feature ``layer`` in layer 0; and our facts stand in ``metadata.info.glasshouse``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_bytes
from glasshouse.base.errors import CheckpointError, UsageError, suggest
from glasshouse.interp.formats.graph import AttributionGraph, GraphLink, GraphNode, Kind
from glasshouse.model.weights import read_json

TYPES: dict[Kind, str] = {
    "token": "embedding",
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "logit": "logit",
}
KIND_OF = {text: kind for kind, text in TYPES.items()}
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FEATURE_ID = re.compile(r"([0-9]{1,12})_([0-9]{1,12})_([0-9]{1,12})")
# circuit-tracer writes a logit's label as: Output "text" (p=0.123); the viewer reads the number from it.
LOGIT_LABEL = re.compile(r'Output "(.*)" \(p=[^()]*\)', re.DOTALL)


def write_graph(path: str | Path, graph: AttributionGraph, *, node_threshold: float | None = None) -> None:
    """Write a graph as the viewer's JSON; equal graphs give equal bytes.

    ``node_threshold``: share of influence down to which the viewer shows nodes at first. It is dropped
    unless every feature and error says its influence, which the viewer compares with it.
    Raises UsageError for a slug that could not be a file's name.
    """
    if not SLUG.fullmatch(graph.slug):
        raise UsageError(f"slug {graph.slug!r} must be letters, digits, '.', '_' or '-', at most 128")
    text = json.dumps(
        graph_json(graph, node_threshold=node_threshold), indent=1, ensure_ascii=False, allow_nan=False
    )
    write_bytes(path, text.encode("utf-8") + b"\n")


def graph_json(graph: AttributionGraph, *, node_threshold: float | None = None) -> dict[str, Any]:
    """The viewer's JSON object of a graph."""
    inner = [n for n in graph.nodes if n.kind in ("feature", "error")]
    metadata: dict[str, Any] = {
        "slug": graph.slug,
        "scan": graph.model,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "schema_version": 1,
        "info": {"glasshouse": {"n_layer": graph.n_layer, **graph.facts}},
    }
    if node_threshold is not None and all(n.influence is not None for n in inner):
        metadata["node_threshold"] = node_threshold
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node_json(n, graph.n_layer) for n in graph.nodes],
        "links": [{"source": k.source, "target": k.target, "weight": k.weight} for k in graph.links],
    }


def pair(layer: int, index: int) -> int:
    """One number for a feature and its layer (Cantor's pairing): the viewer finds feature pages by it."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _node_json(node: GraphNode, n_layer: int) -> dict[str, Any]:
    layer, feature, tail = str(node.layer), node.index or 0, f"{node.index}-0"
    label = node.label
    match node.kind:
        case "feature":
            feature, tail = pair(node.layer, feature), f"{node.layer}_{node.index}-0"
        case "error":
            feature, tail = -1, f"err_{node.layer}_{node.pos}-0"
        case "token":
            layer, feature, tail = "E", node.pos, f"E_{node.index}-{node.pos}"
        case "logit":
            layer, tail = str(n_layer + 1), f"L_{node.index}-{node.pos}"
            # The viewer takes what follows the first "(p=": a token's own text must not hold one.
            label = f'Output "{label.replace("(p=", "( p=")}" (p={node.probability or 0.0:.3f})'
    return {
        "node_id": node.name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": TYPES[node.kind],
        "token_prob": node.probability or 0.0,
        "is_target_logit": node.target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": tail,
        "clerp": label,
        "influence": node.influence,
        "activation": node.activation,
    }


def read_graph(path: str | Path) -> AttributionGraph:
    """Read a viewer JSON, ours or circuit-tracer's. Raises CheckpointError naming what is wrong where.

    A file that does not say how many layers the model has is taken to number its logits' layer as
    circuit-tracer does, two above the last block.
    """
    where = str(path)
    data = read_json(path)
    metadata = _get(data, "metadata", dict, where)
    raw_nodes, raw_links = _get(data, "nodes", list, where), _get(data, "links", list, where)
    _get(data, "qParams", dict, where)
    info = metadata.get("info")
    facts = (
        dict(info["glasshouse"])
        if isinstance(info, dict) and isinstance(info.get("glasshouse"), dict)
        else {}
    )
    said = facts.pop("n_layer", None)
    tokens = _get(metadata, "prompt_tokens", list, f"{where}: metadata")
    if not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(f"{where}: metadata: prompt_tokens must be texts")
    nodes: dict[str, GraphNode] = {}
    for i, raw in enumerate(raw_nodes):
        name, node = _read_node(raw, f"{where}: nodes[{i}]")
        if name in nodes:
            raise CheckpointError(f"{where}: two nodes have the id {name!r}; links to it are ambiguous")
        nodes[name] = node
    links = [_read_link(raw, nodes, f"{where}: links[{i}]") for i, raw in enumerate(raw_links)]
    tops = [
        int(r["layer"]) - 1 for r in raw_nodes if r["feature_type"] == "logit" and _is_number(r.get("layer"))
    ]
    deepest = max([n.layer + 1 for n in nodes.values()] + tops, default=0)
    try:
        return AttributionGraph(
            slug=_get(metadata, "slug", str, f"{where}: metadata"),
            model=_get(metadata, "scan", str, f"{where}: metadata"),
            prompt=_get(metadata, "prompt", str, f"{where}: metadata"),
            tokens=tuple(tokens),
            n_layer=said if type(said) is int else deepest,
            nodes=tuple(nodes.values()),
            links=tuple(links),
            facts=facts,
        )
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _get(data: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(data).__name__}")
    if key not in data:
        raise CheckpointError(f"{where}: {key!r} is missing.{suggest(key, data)}")
    value = data[key]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{where}: {key!r} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _is_number(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,12}", str(value)) is not None


def _optional(raw: dict[str, Any], key: str, where: str) -> float | None:
    return None if raw.get(key) is None else float(_get(raw, key, float, where))


def _read_node(raw: Any, where: str) -> tuple[str, GraphNode]:
    name = _get(raw, "node_id", str, where)
    where = f"{where} ({name!r})"
    kind = KIND_OF.get(_get(raw, "feature_type", str, where))
    if kind is None:
        raise CheckpointError(f"{where}: feature_type {raw['feature_type']!r}; known: {', '.join(KIND_OF)}")
    pos, label = _get(raw, "ctx_idx", int, where), _get(raw, "clerp", str, where)
    layer, index, probability = -1, None, None
    if kind == "feature":
        found = FEATURE_ID.fullmatch(name)
        if found is None or int(found[3]) != pos or found[1] != str(raw.get("layer")):
            raise CheckpointError(
                f"{where}: a feature's id must be layer_feature_position, as its fields say"
            )
        layer, index = int(found[1]), int(found[2])
        if _get(raw, "feature", int, where) not in (index, pair(layer, index)):
            raise CheckpointError(f"{where}: 'feature' {raw['feature']} does not belong to this id")
    elif kind == "error":
        if not _is_number(raw.get("layer")):
            raise CheckpointError(f"{where}: layer {raw.get('layer')!r} is not a layer's number")
        layer = int(raw["layer"])
    else:
        part = name.split("_")
        if len(part) != 3 or not _is_number(part[1]):
            raise CheckpointError(f"{where}: the id does not name a token: expected X_token_position")
        index = int(part[1])
        if kind == "logit":
            probability = _optional(raw, "token_prob", where) or 0.0
            found = LOGIT_LABEL.fullmatch(label)
            label = found[1] if found else label
    activation, influence = _optional(raw, "activation", where), _optional(raw, "influence", where)
    target = kind == "logit" and raw.get("is_target_logit", False) is True
    return name, GraphNode(kind, pos, index, layer, activation, influence, probability, label, target)


def _read_link(raw: Any, nodes: dict[str, GraphNode], where: str) -> GraphLink:
    ends = [_get(raw, end, str, where) for end in ("source", "target")]
    for end in ends:
        if end not in nodes:
            raise CheckpointError(f"{where}: no node has the id {end!r}.{suggest(end, nodes)}")
    weight = float(_get(raw, "weight", float, where))
    return GraphLink(nodes[ends[0]].name, nodes[ends[1]].name, weight)
