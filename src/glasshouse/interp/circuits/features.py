"""Attribution graphs: which transcoder features made this model say this, on this prompt.

    graph = feature_graph(model, tokens, trained.dictionaries)
    graph                                  # the picture and the strongest links
    graph.save("graph.json")               # for circuit-tracer's viewer

Ameisen et al. (2025, "Circuit Tracing"); Marks et al. (2024, arXiv 2403.19647) for sparse feature circuits.
Nodes are the prompt's tokens, the active features, what the transcoders missed (errors), and the likeliest
next tokens. With patterns, norm scales and the set of active features held (`frozen`), the weight of a link
is what its source adds to its target, and a node's links and constant sum to its value *exactly*; how far
the arithmetic is from that is measured for every graph (`FeatureGraph.gap`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.circuits import pruning
from glasshouse.interp.circuits.frozen import Frozen, Layer, by_layer, directions
from glasshouse.interp.circuits.picture import picture
from glasshouse.interp.dictionaries import Dictionary
from glasshouse.interp.formats.graph import AttributionGraph, GraphLink, GraphNode
from glasshouse.interp.formats.viewer import graph_json, write_graph
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest

AT_ONCE = 256  # targets carried back together
PROBABILITY, LOGITS = (
    0.95,
    10,
)  # outputs: the likeliest until so much is covered, at most so many (the paper's)
MAX_GAP = 1e-3  # relative; beyond it the sums do not add up and the graph would mean nothing


class Speller(Protocol):
    """What turns text into token ids and back."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class FeatureGraph:
    """The whole graph of a prompt; `pruned` is the part worth looking at.

    ``weights`` [N, N]: what the source (column) adds to the target (row). ``constants`` [N]: what biases and
    positions add. ``values`` [N]: of features their activation, of outputs their logit less the vocabulary's
    mean; 0 for tokens and errors. ``outputs`` [N]: probability of each output, 0 elsewhere. All float64.
    """

    nodes: tuple[GraphNode, ...]
    weights: Tensor
    constants: Tensor
    values: Tensor
    outputs: Tensor
    prompt: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    n_layer: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> pruning.Kinds:
        """Which nodes are what."""
        kind = [n.kind for n in self.nodes]
        made = (torch.tensor([k == name for k in kind]) for name in ("token", "feature", "error", "logit"))
        return pruning.Kinds(*made)

    @cached_property
    def number(self) -> dict[str, int]:
        """Rows by the names of nodes."""
        return {n.name: i for i, n in enumerate(self.nodes)}

    @cached_property
    def influence(self) -> Tensor:
        """Each node's influence [N] on the outputs, along all paths (`pruning.influence`)."""
        return pruning.influence(self.weights, self.outputs)

    @property
    def replacement(self) -> float:
        """Share of the influence that comes from tokens and not from errors: of this prompt."""
        return pruning.replacement(self.weights, self.outputs, self.kinds)

    @property
    def completeness(self) -> float:
        """Share of what nodes are made of that is not error, weighted by influence: of this prompt."""
        return pruning.completeness(self.weights, self.outputs, self.kinds)

    @property
    def gap(self) -> float:
        """Largest relative distance of a node's links and constant to its value."""
        targets = self.kinds.features | self.kinds.outputs
        off = (self.weights.sum(1) + self.constants - self.values)[targets].abs()
        return float((off / self.values[targets].abs().clamp(min=1.0)).max())

    def effects(self) -> Tensor:
        """What each node adds to each output along all paths [outputs, N]: what removing it takes away.

        The linear model's answer: every feature between changes in proportion, none dies and none awakes.
        """
        values = self.values[:, None]
        per_unit = torch.where(values != 0, self.weights / values, 0.0)
        per_unit[self.kinds.outputs] = 0.0
        direct = self.weights[self.kinds.outputs]
        return direct + pruning.paths(per_unit, direct)

    def pruned(
        self, node_threshold: float = 0.8, edge_threshold: float = 0.98, slug: str = ""
    ) -> AttributionGraph:
        """The nodes and links that hold these shares of all influence, as formats and viewers know them."""
        nodes, edges = pruning.prune(self.weights, self.outputs, self.kinds, node_threshold, edge_threshold)
        share = pruning.reached(self.influence)
        kept = [
            GraphNode(**(vars(n) | {"influence": None if n.kind == "logit" else float(share[i])}))
            for i, n in enumerate(self.nodes)
            if nodes[i]
        ]
        links = tuple(
            GraphLink(self.nodes[source].name, self.nodes[target].name, float(self.weights[target, source]))
            for target, source in edges.nonzero().tolist()
        )
        facts = {
            **self.facts,
            "pruning": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
            "replacement": self.replacement,
            "completeness": self.completeness,
            "gap": self.gap,
        }
        name = slug or f"graph-{hashlib.sha256(repr(self.ids).encode()).hexdigest()[:12]}"
        model = str(facts.get("model_digest", "model"))[:12]
        return AttributionGraph(
            name, model, self.prompt, self.tokens, self.n_layer, tuple(kept), links, facts
        )

    def to_dict(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> dict[str, Any]:
        """The viewer's JSON object of the pruned graph; what was measured is in metadata.info.glasshouse."""
        return graph_json(self.pruned(node_threshold, edge_threshold), node_threshold=node_threshold)

    def save(
        self, path: str | Path, node_threshold: float = 0.8, edge_threshold: float = 0.98, slug: str = ""
    ) -> None:
        """Write the pruned graph as circuit-tracer's viewer reads it."""
        write_graph(path, self.pruned(node_threshold, edge_threshold, slug), node_threshold=node_threshold)

    def __str__(self) -> str:
        count = {k: int(getattr(self.kinds, k).sum()) for k in ("features", "errors", "outputs")}
        return (
            f"{count['features']} features, {count['errors']} errors, {count['outputs']} outputs over "
            f"{len(self.tokens)} tokens; replacement {self.replacement:.3f}, completeness "
            f"{self.completeness:.3f} (one prompt), sums exact to {self.gap:.1e}"
        )

    def _repr_html_(self) -> str:
        return picture(self.pruned(), self.influence, self.number, str(self))


def feature_graph(
    model: GPT,
    prompt: str | Sequence[int] | Tensor,
    transcoders: Mapping[str, Dictionary] | Iterable[Dictionary],
    *,
    tokenizer: Speller | None = None,
    targets: Sequence[int] | None = None,
    max_features: int = 4096,
) -> FeatureGraph:
    """The graph of what ``model`` says after ``prompt``, text or token ids int64 [pos].

    ``transcoders``: from ``blocks.l.mlp_in`` to ``blocks.l.mlp_out``, one a layer; the MLP of a layer without
    one is all error. ``targets``: token ids to explain; None: the likeliest up to 95% of the probability, at
    most 10. ``max_features``: how many of the active features may be nodes (`Frozen`).
    UsageError for a model that cannot be held linear (its message names what of its config), an empty or too
    long prompt, or ids outside the vocabulary; CheckpointError for another model's transcoder; DataError for
    activations that are not finite; VerificationError when the sums do not add up.
    """
    ids, text = _ids(model, prompt, tokenizer)
    ours = by_layer(model, transcoders.values() if isinstance(transcoders, Mapping) else transcoders)
    if max_features < 1:
        raise UsageError(f"max_features is {max_features}: a graph needs at least one feature")
    with torch.no_grad():
        frozen = Frozen(model, ids, ours, max_features)
        outputs = _outputs(frozen.logits[-1], targets)
        weights, constants, values = _all_edges(frozen, outputs)
    spelled = [_spell(tokenizer, i) for i in ids.tolist()]
    nodes = _nodes(frozen, outputs, spelled, tokenizer)
    counts = torch.zeros(len(nodes), dtype=torch.float64)
    counts[-len(outputs) :] = frozen.logits[-1].softmax(0)[outputs].cpu()
    facts = {
        "model_digest": weights_digest(model),
        "transcoders": {f"blocks.{i}.mlp": weights_digest(d) for i, d in ours.items()},
        "held": "attention patterns, norm scales, active features",
        "active_features": frozen.active,
        "features_in_graph": sum(len(k.features) for k in frozen.layers),
        "n_prompts": 1,
    }
    graph = FeatureGraph(
        nodes, weights, constants, values, counts, text or "".join(spelled), tuple(spelled),
        tuple(ids.tolist()), model.config.n_layer, facts,
    )  # fmt: skip
    if not graph.gap <= MAX_GAP:
        raise VerificationError(
            f"links miss their nodes' values by {graph.gap:.1e} of them: not this model's"
        )
    return graph


def _ids(model: GPT, prompt: Any, tokenizer: Speller | None) -> tuple[Tensor, str]:
    """Token ids [pos] on the model's device, and the text if it was one."""
    text = prompt if isinstance(prompt, str) else ""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("a prompt of text needs tokenizer=; or give token ids")
        prompt = tokenizer.encode(prompt)
    ids = torch.as_tensor(prompt, device=model.device)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise UsageError(f"a prompt is one row of token ids [pos], at least one; got {list(ids.shape)}")
    config = model.config
    if len(ids) > config.context:
        raise UsageError(f"the prompt's {len(ids)} tokens exceed the model's context of {config.context}")
    _check_ids(ids, config.vocab_size, "the prompt")
    return ids.long(), text


def _check_ids(ids: Tensor, vocab: int, what: str) -> None:
    if bool(((ids < 0) | (ids >= vocab)).any()):
        raise UsageError(f"{what} has token ids outside the vocabulary 0..{vocab - 1}: {ids.tolist()}")


def _outputs(logits: Tensor, targets: Sequence[int] | None) -> Tensor:
    """Token ids of the outputs, the likeliest first."""
    probability = logits.softmax(0)
    if targets is not None:
        ids = torch.tensor(sorted(set(targets), key=list(targets).index), device=logits.device)
        if not len(ids):
            raise UsageError("targets is empty: nothing to explain")
        _check_ids(ids, len(logits), "targets")
        return ids
    order = probability.argsort(descending=True, stable=True)
    needed = int((probability[order].cumsum(0) < PROBABILITY).sum()) + 1
    return order[: min(needed, LOGITS)]


def _spell(tokenizer: Speller | None, token: int) -> str:
    return f"<{token}>" if tokenizer is None else tokenizer.decode([token])


def _nodes(
    frozen: Frozen, outputs: Tensor, spelled: Sequence[str], tokenizer: Speller | None
) -> tuple[GraphNode, ...]:
    """Tokens, then layer by layer errors and features, then outputs: the order of rows and columns."""
    nodes = [
        GraphNode("token", p, i, label=spelled[p], activation=None)
        for p, i in enumerate(frozen.tokens.tolist())
    ]
    for number, layer in enumerate(frozen.layers):
        f = layer.features
        nodes += [GraphNode("error", p, None, number) for p in range(len(spelled))]
        nodes += [
            GraphNode("feature", p, i, number, activation=v, label=f"layer {number}, feature {i}")
            for p, i, v in zip(f.pos.tolist(), f.index.tolist(), f.values.tolist(), strict=True)
        ]
    probability, last = frozen.logits[-1].softmax(0), len(spelled) - 1
    for rank, i in enumerate(outputs.tolist()):
        share, text = float(probability[i]), _spell(tokenizer, i)
        nodes.append(GraphNode("logit", last, i, probability=share, label=text, target=rank == 0))
    return tuple(nodes)


def _all_edges(frozen: Frozen, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, N], constants [N] and values [N], on the CPU."""
    T, sizes = len(frozen.tokens), [len(k.features) for k in frozen.layers]
    starts = [T + i * T + sum(sizes[:i]) for i in range(len(sizes))]  # of each layer's errors
    n = T + len(sizes) * T + sum(sizes) + len(outputs)
    weights = torch.zeros(n, n, dtype=torch.float64)
    constants, values = weights.new_zeros(n), weights.new_zeros(n)
    c, constant = frozen.unembed(outputs, T - 1)
    top = slice(n - len(outputs), n)
    weights[top], constants[top] = _edges(frozen, c, constant, len(sizes), starts, n)
    values[top] = (directions(frozen.model, outputs) @ frozen.read).cpu()
    for number, layer in enumerate(frozen.layers):
        first = starts[number] + T
        values[first : first + sizes[number]] = layer.features.values.cpu()
        for chosen in torch.arange(sizes[number]).split(AT_ONCE):
            c, constant = _beneath_mlp(layer, *layer.encoders(chosen.to(outputs.device)))
            rows = first + chosen
            weights[rows], constants[rows] = _edges(frozen, c, constant, number, starts, n)
    return weights, constants, values


def _beneath_mlp(layer: Layer, c: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """From what the MLP reads [n, T, D] to the stream before the block."""
    if layer.block.parallel:
        return c, constant
    attended, more = layer.pull_attention(c)
    return c + attended, constant + more


def _edges(
    frozen: Frozen, c: Tensor, constant: Tensor, below: int, starts: Sequence[int], n: int
) -> tuple[Tensor, Tensor]:
    """Links [m, n] into targets with covectors ``c`` [m, T, D] on the stream after the first ``below``
    layers, and their constants [m].
    """
    found, T = c.new_zeros(len(c), n), c.shape[1]
    for number in reversed(range(below)):
        layer, at = frozen.layers[number], starts[number]
        found[:, at : at + T] = (c * layer.errors).sum(-1)
        written = layer.features.values[:, None] * layer.features.decoders
        for p in layer.features.pos.unique().tolist():
            here = (layer.features.pos == p).nonzero()[:, 0]
            found[:, at + T + here] = c[:, p] @ written[here].T
        constant = constant + (c * layer.constant).sum((1, 2))
        beside = torch.zeros_like(c)
        if layer.skip is not None:
            beside, more = layer.pull_skip(c)
            constant = constant + more
        if layer.block.parallel:
            attended, more = layer.pull_attention(c)
            c, constant = c + beside + attended, constant + more
        else:
            c, constant = _beneath_mlp(layer, c + beside, constant)
    found[:, :T] = (c * frozen.embedded).sum(-1)
    return found.cpu(), (constant + (c * frozen.constant).sum((1, 2))).cpu()
