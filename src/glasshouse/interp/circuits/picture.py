"""An attribution graph drawn: tokens below, a level a layer, outputs on top; and its strongest links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from markupsafe import Markup
from torch import Tensor

from glasshouse.draw import esc, label, styled
from glasshouse.draw.network import Link, Node, network
from glasshouse.interp.formats.graph import AttributionGraph, GraphNode

DRAWN, A_LEVEL = 40, 7  # nodes in the picture and on a level, the most influential: more would overlap


def picture(graph: AttributionGraph, influence: Tensor, number: Mapping[str, int], summary: str) -> str:
    """HTML of a pruned ``graph``; ``influence`` [N] by each node's row in ``number``."""
    linked = {name for k in graph.links for name in (k.source, k.target)}
    ranked = [n for n in graph.nodes if n.name in linked or n.target]
    ranked.sort(key=lambda n: (-(n.probability or 0.0), -float(influence[number[n.name]]), n.name))
    room = Counter[int]()
    shown: list[GraphNode] = []
    for n in ranked:
        level = _level(n, graph.n_layer)
        room[level] += 1
        if room[level] <= A_LEVEL and len(shown) < DRAWN:
            shown.append(n)
    names = _names(shown)
    nodes = _placed(shown, names, graph.n_layer)
    links = [
        Link(names[k.source], names[k.target], k.weight, f"{k.source} to {k.target}: {label(k.weight)}")
        for k in graph.links
        if k.source in names and k.target in names
    ]
    left = len(graph.nodes) - len(shown)
    note = f"the {len(shown)} most influential nodes" + (f"; {left} more are in the graph" if left else "")
    drawn = network(nodes, links, "Attribution graph", note)
    return styled(drawn, Markup("<p>{} ({})</p>").format(esc(summary), esc(note))) + graph._repr_html_()


def _names(nodes: list[GraphNode]) -> dict[str, str]:
    """What stands in each box, different for every node."""
    names: dict[str, str] = {}
    for n in nodes:
        match n.kind:
            case "token":
                names[n.name] = f"{n.pos}:{n.label}"
            case "feature":
                names[n.name] = f"{n.layer}.{n.index}@{n.pos}"
            case "error":
                names[n.name] = f"err {n.layer}@{n.pos}"
            case "logit":
                names[n.name] = f"{n.label} {n.probability or 0:.2f}"
    seen = Counter(names.values())  # two tokens may be spelled alike, and share a probability
    return {key: text if seen[text] == 1 else f"{text} {key}" for key, text in names.items()}


def _placed(nodes: list[GraphNode], names: Mapping[str, str], n_layer: int) -> list[Node]:
    """Nodes side by side on their levels, those of earlier positions further left."""
    levels: dict[int, list[GraphNode]] = {}
    for n in nodes:
        levels.setdefault(_level(n, n_layer), []).append(n)
    return [
        Node(names[n.name], level, (i + 0.5) / len(row))
        for level, row in levels.items()
        for i, n in enumerate(sorted(row, key=lambda n: (n.pos, n.kind, n.index or 0)))
    ]


def _level(node: GraphNode, n_layer: int) -> int:
    """Tokens 0, layers from 1, outputs on top."""
    return {"token": 0, "logit": n_layer + 1}.get(node.kind, node.layer + 1)
