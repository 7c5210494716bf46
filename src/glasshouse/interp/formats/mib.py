"""Circuit files of the Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151).

``{cfg, nodes: {name: {in_graph}}, edges: {name: {score, in_graph}}}`` as EAP-IG's ``Graph.to_json`` writes
and ``Graph.from_json`` reads. Nodes are ``input``, ``a{layer}.h{head}``, ``m{layer}``, ``logits``; an edge
into a head says which of its inputs: ``input->a0.h0<q>``. GPT-2 small has 158 nodes and 32,491 edges.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_bytes
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import GPTConfig
from glasshouse.model.weights import read_json

NODE = re.compile(r"input|embed|pos_embed|logits|m(?P<mlp>\d{1,4})|a(?P<layer>\d{1,4})\.h(?P<head>\d{1,4})")
EDGE = re.compile(r"(?P<source>[a-z0-9._]+)->(?P<target>[a-z0-9.]+)(?:<(?P<port>[qkv])>)?")
MOST_HEADS = 2**14  # of all layers; a file that claims more would fill memory with names
CFG = {"n_layers": int, "n_heads": int, "parallel_attn_mlp": bool, "d_model": int}


@dataclass(frozen=True)
class Shape:
    """What decides which nodes and edges a model has; ``d_model`` is carried because the files name it."""

    n_layer: int
    n_head: int
    d_model: int
    parallel: bool = False
    split_input: bool = False  # ours alone: token and position embeddings are two nodes, not one input

    @classmethod
    def of(cls, config: GPTConfig) -> Shape:
        """The shape of a model. Grouped key/value heads count once for each query head, as in MIB."""
        return cls(config.n_layer, config.n_head, config.d_model, config.parallel)

    @property
    def n_nodes(self) -> int:
        """Every head, every MLP, the input and the logits."""
        return len(self.inputs) + 1 + self.n_layer * (self.n_head + 1)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The nodes before the first block."""
        return ("embed", "pos_embed") if self.split_input else ("input",)

    @property
    def n_edges(self) -> int:
        """Edges into q, k and v of every head, into every MLP, and into the logits."""
        total = 0
        for layer in range(self.n_layer):
            below = len(self.inputs) + layer * (self.n_head + 1)  # nodes that write before this block
            total += below * 3 * self.n_head + below + (0 if self.parallel else self.n_head)
        return total + self.n_nodes - 1

    def nodes(self) -> Iterator[str]:
        """All names of nodes, bottom up."""
        yield from self.inputs
        for layer in range(self.n_layer):
            yield from (f"a{layer}.h{head}" for head in range(self.n_head))
            yield f"m{layer}"
        yield "logits"

    def check_node(self, name: str) -> tuple[int, int]:
        """When a node (reads, writes), in half blocks from the bottom. UsageError for a name not in it."""
        found = NODE.fullmatch(name)
        if name in self.inputs:
            return -1, 0
        if name == "logits":
            return 2 * self.n_layer, 2 * self.n_layer + 1
        number = (found["mlp"] or found["layer"]) if found is not None else None
        if found is not None and number is not None and str(int(number)) == number:
            layer = int(number)
            head = found["head"]
            fits = head is None or (int(head) < self.n_head and str(int(head)) == head)
            if layer < self.n_layer and fits:
                late = found["mlp"] is not None and not self.parallel
                return 2 * layer + late, 2 * layer + (2 if self.parallel or late else 1)
        raise UsageError(
            f"no node {name!r} in a model of {self.n_layer} layers and {self.n_head} heads; nodes are "
            f"{', '.join(map(repr, self.inputs))}, 'a0.h0', 'm0', 'logits'"
        )

    def check_edge(self, name: str) -> tuple[str, str, str | None]:
        """(source, target, port) of an edge's name. UsageError when this model has no such edge."""
        found = EDGE.fullmatch(name)
        if found is None:
            raise UsageError(f"{name!r} is not an edge's name; expected 'input->a0.h0<q>' or 'a0.h0->m0'")
        source, target, port = found["source"], found["target"], found["port"]
        writes, reads = self.check_node(source)[1], self.check_node(target)[0]
        if (port is not None) != target.startswith("a"):
            raise UsageError(f"{name!r}: an edge into a head, and no other, says <q>, <k> or <v>")
        if source == "logits" or target in self.inputs or writes > reads:
            raise UsageError(f"{name!r}: {target} reads before {source} writes in this model")
        return source, target, port


@dataclass(frozen=True)
class ScoredEdge:
    """An edge's score by the method that found it, and whether it belongs to the circuit."""

    score: float
    in_graph: bool


@dataclass(frozen=True)
class CircuitFile:
    """A circuit over a model's components, checked when made (UsageError).

    ``edges``: all that were scored, by name; an edge of the model that is missing has score 0 and is outside.
    ``nodes``: whether each node is in the circuit; left empty, those at an end of an edge of the circuit, and
    the logits, are. Files whose circuit was not pruned mark edges from nodes that they leave out; both marks
    are kept, and ``inside`` says what they mean together.
    ``facts``: what it was measured on (model digest, ablation, metric, n, data), as JSON values.
    """

    shape: Shape
    edges: Mapping[str, ScoredEdge]
    nodes: Mapping[str, bool] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = {"logits"}
        for name, edge in self.edges.items():
            source, target, _ = self.shape.check_edge(name)
            if not math.isfinite(edge.score):
                raise UsageError(f"edge {name!r}: the score is {edge.score}")
            if edge.in_graph:
                ends.update((source, target))
        for name in self.nodes:
            self.shape.check_node(name)
        given = {"logits": True, **self.nodes} if self.nodes else dict.fromkeys(ends, True)
        object.__setattr__(self, "nodes", {name: given.get(name, False) for name in self.shape.nodes()})

    @property
    def inside(self) -> frozenset[str]:
        """The names of the circuit's edges: those marked, both of whose ends are in the circuit."""
        marked = (name for name, edge in self.edges.items() if edge.in_graph)
        ends = {name: self.shape.check_edge(name)[:2] for name in marked}
        return frozenset(
            n for n, (source, target) in ends.items() if self.nodes[source] and self.nodes[target]
        )

    @property
    def complete(self) -> bool:
        """Whether every edge of the model is listed."""
        return len(self.edges) == self.shape.n_edges


def write_circuit(path: str | Path, circuit: CircuitFile) -> None:
    """Write a circuit as MIB's JSON; equal circuits give equal bytes. Our facts stand in ``glasshouse``."""
    shape = circuit.shape
    data: dict[str, Any] = {
        "cfg": {
            "n_layers": shape.n_layer,
            "n_heads": shape.n_head,
            "parallel_attn_mlp": shape.parallel,
            "d_model": shape.d_model,
        },
        "nodes": {name: {"in_graph": inside} for name, inside in circuit.nodes.items()},
        "edges": {
            name: {"score": edge.score, "in_graph": edge.in_graph}
            for name, edge in sorted(circuit.edges.items())
        },
    }
    if circuit.facts:
        data["glasshouse"] = dict(circuit.facts)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def read_circuit(path: str | Path, shape: Shape | None = None) -> CircuitFile:
    """Read a circuit file, ours or EAP-IG's.

    ``shape``: of the model it is meant for; another one is refused. Raises CheckpointError naming file, key
    and what is wrong: missing keys, unknown or repeated edges, scores that are no numbers. Scores of nodes
    are not kept; a file that selects neurons is refused, because a circuit of components would silently be a
    larger one.
    """
    where = str(path)
    data = read_json(path)
    facts = data.get("glasshouse", {})
    if not isinstance(facts, dict):
        raise CheckpointError(f"{where}: 'glasshouse' must be an object")
    found = _shape(_object(data, "cfg", where), facts.get("split_input") is True, f"{where}: cfg")
    if shape is not None and found != shape:
        raise CheckpointError(f"{where} is a circuit of {found}, not of {shape}")
    edges = {
        name: _edge(raw, f"{where}: edge {name!r}") for name, raw in _object(data, "edges", where).items()
    }
    nodes = {
        name: _node(raw, f"{where}: node {name!r}") for name, raw in _object(data, "nodes", where).items()
    }
    try:
        return CircuitFile(found, edges, nodes, facts)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _object(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key!r} is missing or not an object")
    return value


def _shape(cfg: Mapping[str, Any], split_input: bool, where: str) -> Shape:
    for key, kind in CFG.items():
        if type(cfg.get(key)) is not kind:
            raise CheckpointError(f"{where}: {key!r} must be {kind.__name__}, found {cfg.get(key)!r}")
        if kind is int and not 1 <= cfg[key] <= 10_000_000:
            raise CheckpointError(f"{where}: {key!r} is {cfg[key]}")
    if cfg["n_layers"] * cfg["n_heads"] > MOST_HEADS:
        raise CheckpointError(f"{where}: {cfg['n_layers']} layers of {cfg['n_heads']} heads are absurd")
    return Shape(cfg["n_layers"], cfg["n_heads"], cfg["d_model"], cfg["parallel_attn_mlp"], split_input)


def _edge(raw: Any, where: str) -> ScoredEdge:
    if not isinstance(raw, dict) or not {"score", "in_graph"} <= raw.keys():
        raise CheckpointError(f"{where}: needs 'score' and 'in_graph'")
    score, inside = raw["score"], raw["in_graph"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not isinstance(inside, bool):
        raise CheckpointError(f"{where}: score {score!r} must be a number, in_graph {inside!r} true or false")
    return ScoredEdge(float(score), inside)


def _node(raw: Any, where: str) -> bool:
    inside = raw.get("in_graph") if isinstance(raw, dict) else None
    if not isinstance(inside, bool):
        raise CheckpointError(f"{where}: needs 'in_graph', true or false")
    if "neurons" in raw:
        raise CheckpointError(f"{where} selects neurons; only circuits of whole components are read here")
    return inside
