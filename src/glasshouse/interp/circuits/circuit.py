"""A circuit: which edges belong to a behaviour, with their scores and everything they were measured on.

Saved as MIB's own JSON (``cfg``, ``nodes``, ``edges``), with our facts in one key more, so that a circuit can
be kept, checked again on any later checkpoint, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from glasshouse.base.atomic import write_json
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.base.score import Score
from glasshouse.draw import STYLE, esc, label
from glasshouse.draw.network import Link, Node, network
from glasshouse.draw.table import table
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.formats.mib import read_circuit
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest

DRAWN = 150  # edges in a picture; more are only ink


@dataclass(frozen=True)
class About:
    """What a result rests on: it means nothing without its ablation, its data and its model.

    ``data`` and ``model`` are SHA-256 digests; ``n`` rows; ``settings`` of the method; ``seconds`` it took.
    """

    method: str
    ablation: str
    metric: str
    n: int
    data: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        chosen = "".join(f", {k} {v}" for k, v in self.settings.items())
        return (
            f"{self.method}{chosen}; ablation {self.ablation}; {self.metric}; n={self.n}; "
            f"data {self.data[:12]}; model {self.model[:12]}"
        )


@dataclass(frozen=True)
class Circuit:
    """Edges of a model that carry a behaviour.

    ``scores`` float64 [edge] and ``kept`` bool [edge] in the order of ``graph.edges``. ``recovered``: its
    faithfulness as measured when it was found (None: not measured yet).
    """

    graph: Graph
    scores: np.ndarray
    kept: np.ndarray
    about: About
    recovered: Score | None = None

    def __post_init__(self) -> None:
        n = len(self.graph.edges)
        if self.scores.shape != (n,) or self.kept.shape != (n,) or self.kept.dtype != np.bool_:
            raise UsageError(f"a circuit of this model needs {n} scores and as many memberships")
        if not np.isfinite(self.scores).all():
            bad = self.graph.edges[int((~np.isfinite(self.scores)).argmax())]
            raise UsageError(f"the score of {bad} is not a finite number")

    @classmethod
    def of(cls, model: GPT, edges: Sequence[str], about: About, *, split_input: bool = False) -> Circuit:
        """A circuit given by the names of its edges; scores are 1 and 0."""
        graph = Graph.of(model.config, split_input=split_input)
        kept = np.zeros(len(graph.edges), dtype=bool)
        kept[graph.find(edges)] = True
        return cls(graph, kept.astype(np.float64), kept, about)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of its edges, the highest score by size first."""
        inside = np.flatnonzero(self.kept)
        return tuple(
            self.graph.edges[i] for i in inside[np.argsort(-np.abs(self.scores[inside]), kind="stable")]
        )

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes at the ends of its edges, in the order of computation."""
        ends = {end.partition("<")[0] for name in self.edges for end in name.split("->")}
        return tuple(name for name in self.graph.nodes if name in ends)

    @property
    def density(self) -> float:
        """Its share of all edges."""
        return len(self) / len(self.graph.edges)

    def fits(self, model: GPT) -> bool:
        """Whether it was found on this very model. UsageError when the model has other edges."""
        graph = Graph.of(model.config, split_input=self.graph.split_input)
        if graph != self.graph:
            raise UsageError(
                f"a circuit of {self.graph.n_layer} layers and {self.graph.n_head} heads does not fit one "
                f"of {graph.n_layer} and {graph.n_head}"
            )
        return weights_digest(model) == self.about.model

    def to_mib(self) -> dict[str, Any]:
        """MIB's structure, our facts under ``glasshouse``: plain numbers, text and booleans."""
        inside = set(self.nodes) | {"logits"}
        about = asdict(self.about) | {"split_input": self.graph.split_input}
        if self.recovered is not None:
            about["recovered"] = asdict(self.recovered)
        rows = zip(self.graph.edges, self.scores.tolist(), self.kept.tolist(), strict=True)
        return {
            "cfg": self.graph.about(),
            "nodes": {name: {"in_graph": name in inside} for name in self.graph.nodes},
            "edges": {name: {"score": score, "in_graph": kept} for name, score, kept in rows},
            "glasshouse": about,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_mib` as JSON, whole or not at all."""
        write_json(path, self.to_mib())

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote, or MIB's own files. CheckpointError names file, key and what is wrong.

        Of a file that was not pruned, edges at nodes that it leaves out are not in the circuit.
        """
        file = read_circuit(path)
        shape = file.shape
        graph = Graph(
            shape.n_layer, shape.n_head, shape.d_model, shape.parallel, split_input=shape.split_input
        )
        scores, kept = np.zeros(len(graph.edges)), np.zeros(len(graph.edges), dtype=bool)
        for name, edge in file.edges.items():
            scores[graph.number[name]] = edge.score
        kept[graph.find(sorted(file.inside))] = True
        return cls(graph, scores, kept, *_facts(file.facts or None, str(path)))

    def diff(self, other: Circuit) -> CircuitDiff:
        """What another circuit has more, has less and shares. UsageError for another shape of model."""
        if other.graph != self.graph:
            raise UsageError("circuits of different shapes cannot be compared edge by edge")
        return CircuitDiff(self, other)

    def show(self, title: str = "") -> Markup:
        """The circuit as a picture: layers from below to above, width by score, colour by sign."""
        names = self.edges[:DRAWN]
        score = {name: float(self.scores[self.graph.number[name]]) for name in names}
        links = [_link(name, value) for name, value in score.items()]
        nodes = [Node(name, *_place(self.graph, name)) for name in self.nodes]
        note = f" (the {DRAWN} strongest of {len(self)} edges)" if len(self) > DRAWN else ""
        return network(nodes, links, title or f"Circuit of {len(self)} edges{note}", str(self.about))

    def _repr_html_(self) -> str:
        known = f"; recovers {self.recovered}" if self.recovered is not None else ""
        head = f"{len(self)} of {len(self.graph.edges)} edges, {len(self.nodes)} nodes{known}. {self.about}"
        return str(Markup("<style>{}</style><div>{}{}</div>").format(Markup(STYLE), self.show(), esc(head)))


@dataclass(frozen=True)
class CircuitDiff:
    """Two circuits of one shape, edge by edge."""

    before: Circuit
    after: Circuit

    def _names(self, chosen: np.ndarray) -> tuple[str, ...]:
        return tuple(self.before.graph.edges[i] for i in np.flatnonzero(chosen))

    @property
    def added(self) -> tuple[str, ...]:
        """Edges only the second has."""
        return self._names(self.after.kept & ~self.before.kept)

    @property
    def removed(self) -> tuple[str, ...]:
        """Edges only the first has."""
        return self._names(self.before.kept & ~self.after.kept)

    @property
    def shared(self) -> tuple[str, ...]:
        """Edges both have."""
        return self._names(self.before.kept & self.after.kept)

    @property
    def overlap(self) -> float:
        """Shared edges as a share of those either has (Jaccard 1901); 1 for two empty circuits."""
        either = int((self.before.kept | self.after.kept).sum())
        return len(self.shared) / either if either else 1.0

    def __str__(self) -> str:
        return (
            f"{len(self.shared)} edges shared, {len(self.removed)} gone, {len(self.added)} new "
            f"(overlap {self.overlap:.2f})"
        )

    def _repr_html_(self) -> str:
        rows = [
            [kind, name, label(float(self.before.scores[i])), label(float(self.after.scores[i]))]
            for kind, names in (("gone", self.removed), ("new", self.added), ("shared", self.shared))
            for name in names[:DRAWN]
            for i in [self.before.graph.number[name]]
        ]
        caption = "Two circuits compared"
        return str(table(["", "edge", "before", "after"], rows, caption, numeric=(2, 3))) + str(
            esc(str(self))
        )


def measured(circuit: Circuit, recovered: Score) -> Circuit:
    """The circuit with its measured faithfulness."""
    return replace(circuit, recovered=recovered)


def _facts(facts: Any, where: str) -> tuple[About, Score | None]:
    if facts is None:
        return About("unknown", "unknown", "unknown", 0, "", ""), None
    known = dict(facts) if isinstance(facts, dict) else {}
    known.pop("split_input", None)
    recovered = known.pop("recovered", None)
    try:
        return About(**known), Score(**recovered) if recovered is not None else None
    except TypeError as error:
        raise CheckpointError(f"{where}: glasshouse: {error}") from error


def _place(graph: Graph, name: str) -> tuple[int, float]:
    """Level from below and place from the left (0 to 1) of a node."""
    if name == "logits":
        return 2 * graph.n_layer + 1, 0.5
    at = graph.writers.index(name)
    if at < graph.first:
        return 0, 0.5 if graph.first == 1 else 0.35 + 0.3 * at
    layer, place = divmod(at - graph.first, graph.n_head + 1)
    if place == graph.n_head:
        return 2 * layer + 2, 0.5
    return 2 * layer + 1, (place + 0.5) / graph.n_head


def _link(name: str, score: float) -> Link:
    writer, reader = name.split("->")
    node, _, part = reader.partition("<")
    return Link(writer, node, score, f"{name}: {label(score)}", part.rstrip(">"))
