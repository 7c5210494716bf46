"""An attribution graph in memory: which features, errors and tokens push which logits, and how much.

Nodes and links as in Ameisen et al. (2025, "Circuit Tracing", transformer-circuits.pub): tokens at the
bottom, transcoder features and reconstruction errors of each layer above them, logits at the top; a link's
weight is the source's direct effect on the target. Nothing here knows a file format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from glasshouse.base.errors import UsageError, suggest
from glasshouse.draw import table
from glasshouse.draw.text import esc

Kind = Literal["token", "feature", "error", "logit"]
KINDS: tuple[Kind, ...] = ("token", "feature", "error", "logit")


@dataclass(frozen=True)
class GraphNode:
    """One node. ``index``: number of the feature, or of the token in the vocabulary; None for an error.

    ``layer`` counts blocks from 0 for features and errors, and is not used for tokens (-1) and logits (-1).
    ``activation``: the feature's value at ``pos``. ``influence``: the share of total influence reached when
    nodes are taken in order of influence down to this one, in [0, 1]. ``probability`` of a logit's token.
    ``label``: a description for people; for a logit, its token's text.
    """

    kind: Kind
    pos: int
    index: int | None = None
    layer: int = -1
    activation: float | None = None
    influence: float | None = None
    probability: float | None = None
    label: str = ""
    target: bool = False

    @property
    def name(self) -> str:
        """The name links use: ``E_{token}_{pos}``, ``{layer}_{feature}_{pos}``, ``err_...``, ``L_...``."""
        match self.kind:
            case "token":
                return f"E_{self.index}_{self.pos}"
            case "feature":
                return f"{self.layer}_{self.index}_{self.pos}"
            case "error":
                return f"err_{self.layer}_{self.pos}"
        return f"L_{self.index}_{self.pos}"


@dataclass(frozen=True)
class GraphLink:
    """The direct effect ``weight`` of one node on another, by their names."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class AttributionGraph:
    """A prompt's attribution graph. Checked when made: UsageError names the node or link that is wrong.

    ``model``: what the viewer calls the scan, the name of model and transcoders. ``slug``: the graph's own
    name. ``facts``: what it was measured with (digests, settings of generation and pruning, ablation, n), as
    JSON values by name.
    """

    slug: str
    model: str
    prompt: str
    tokens: tuple[str, ...]
    n_layer: int
    nodes: tuple[GraphNode, ...]
    links: tuple[GraphLink, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UsageError(f"graph {self.slug!r} has no prompt tokens")
        by_name: dict[str, GraphNode] = {}
        for node in self.nodes:
            self._check_node(node)
            if node.name in by_name:
                raise UsageError(f"graph {self.slug!r}: two nodes are called {node.name!r}")
            by_name[node.name] = node
        seen: set[tuple[str, str]] = set()
        for link in self.links:
            self._check_link(link, by_name)
            if (link.source, link.target) in seen:
                raise UsageError(f"graph {self.slug!r}: {link.source!r} -> {link.target!r} is linked twice")
            seen.add((link.source, link.target))

    def _check_node(self, node: GraphNode) -> None:
        where = f"graph {self.slug!r}, node {node.name!r}"
        if node.kind not in KINDS:
            raise UsageError(f"{where}: unknown kind {node.kind!r}.{suggest(str(node.kind), KINDS)}")
        if not 0 <= node.pos < len(self.tokens):
            raise UsageError(f"{where}: position {node.pos} is outside the {len(self.tokens)} prompt tokens")
        if node.kind in ("feature", "error"):
            if not 0 <= node.layer < self.n_layer:
                raise UsageError(f"{where}: layer {node.layer} is outside the model's {self.n_layer}")
        elif node.layer != -1:
            raise UsageError(f"{where}: a {node.kind} has no layer; leave it at -1, not {node.layer}")
        if (node.index is None) != (node.kind == "error") or (node.index is not None and node.index < 0):
            raise UsageError(f"{where}: index {node.index} does not fit a {node.kind}")
        if (node.probability is None) == (node.kind == "logit") or (node.target and node.kind != "logit"):
            raise UsageError(f"{where}: logits have a probability and may be targets; other nodes neither")
        for what in ("activation", "influence", "probability"):
            value = getattr(node, what)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{where}: {what} is {value}")

    def _check_link(self, link: GraphLink, by_name: Mapping[str, GraphNode]) -> None:
        where = f"graph {self.slug!r}, link {link.source!r} -> {link.target!r}"
        for end in (link.source, link.target):
            if end not in by_name:
                raise UsageError(f"{where}: no node is called {end!r}.{suggest(end, by_name)}")
        if not math.isfinite(link.weight):
            raise UsageError(f"{where}: the weight is {link.weight}")
        source, target = by_name[link.source], by_name[link.target]
        if target.kind in ("token", "error"):
            raise UsageError(f"{where}: nothing in the graph explains a {target.kind}")
        if self._height(source) >= self._height(target) or source.pos > target.pos:
            raise UsageError(f"{where} runs against the model: down the layers, or from a later position")

    def _height(self, node: GraphNode) -> int:
        return {"token": -1, "logit": self.n_layer}.get(node.kind, node.layer)

    def node(self, name: str) -> GraphNode:
        """The node called ``name``; UsageError offers the nearest."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(f"no node {name!r} in the graph.{suggest(name, [n.name for n in self.nodes])}")

    def into(self, name: str) -> tuple[GraphLink, ...]:
        """The links into a node, strongest first."""
        self.node(name)
        found = [link for link in self.links if link.target == name]
        return tuple(sorted(found, key=lambda link: (-abs(link.weight), link.source)))

    def _repr_html_(self) -> str:
        count = {kind: sum(n.kind == kind for n in self.nodes) for kind in KINDS}
        labels = {n.name: n.label for n in self.nodes}
        top = sorted(self.links, key=lambda link: (-abs(link.weight), link.source, link.target))[:20]
        rows = [(k.source, labels[k.source], k.target, labels[k.target], f"{k.weight:+.4g}") for k in top]
        summary = Markup("<p>{}: {}; {} links</p>").format(
            esc(self.prompt), ", ".join(f"{n} {kind}s" for kind, n in count.items()), len(self.links)
        )
        head = ("source", "what", "target", "what", "weight")
        return str(summary + table(head, rows, "strongest links", numeric={4}))
