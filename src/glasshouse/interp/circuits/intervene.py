"""Whether an attribution graph is true of the real model: ablate its features there and compare.

Ameisen et al. (2025, "Circuit Tracing", "Validating the replacement model"): what a feature writes is taken
out of the real MLP's output at its position, everything after it is computed anew (patterns, norms, MLPs),
and the change of the output is compared with the graph's prediction, which holds all of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import table
from glasshouse.interp.circuits.features import FeatureGraph
from glasshouse.interp.circuits.frozen import by_layer, directions
from glasshouse.interp.dictionaries import Dictionary
from glasshouse.model import GPT, Taps
from glasshouse.model.digest import weights_digest

AT_ONCE = 64  # ablations in one forward pass
ENOUGH = 5  # graphs from which on prompts, and not features, are what is drawn again for intervals


@dataclass(frozen=True)
class Interventions:
    """Each ablated feature: its graph's number, its name, and the predicted and measured change of the first
    output's logit (less the vocabulary's mean, before any soft cap), float64 [n].

    Zero ablation of one feature at one position. ``chosen``: how features were chosen.
    """

    graph: np.ndarray
    names: tuple[str, ...]
    predicted: np.ndarray
    measured: np.ndarray
    chosen: str

    @property
    def over(self) -> str:
        """What intervals are over: prompts when there are enough, else the ablated features."""
        return "prompts" if len(np.unique(self.graph)) >= ENOUGH else "features"

    def _score(self, of: str) -> Score:
        groups = [np.flatnonzero(self.graph == g) for g in np.unique(self.graph)]
        units = groups if self.over == "prompts" else [np.array([i]) for i in range(len(self.graph))]

        def statistic(drawn: np.ndarray) -> float:
            rows = np.concatenate([units[int(i)] for i in drawn])
            return _STATISTICS[of](self.predicted[rows], self.measured[rows])

        return bootstrap(np.arange(len(units)), statistic)

    @property
    def correlation(self) -> Score:
        """Pearson's correlation of prediction and measurement; 0 where one of them does not vary."""
        return self._score("correlation")

    @property
    def rank_correlation(self) -> Score:
        """Spearman's: whether the order is right, whatever the sizes."""
        return self._score("rank")

    @property
    def same_sign(self) -> Score:
        """Share of ablations whose effect has the predicted sign."""
        return self._score("sign")

    def __str__(self) -> str:
        return (
            f"{len(self.names)} features ablated in {len(np.unique(self.graph))} prompts ({self.chosen}): "
            f"correlation {self.correlation}, rank correlation {self.rank_correlation}, same sign "
            f"{self.same_sign}; intervals over {self.over}"
        )

    def _repr_html_(self) -> str:
        scores = [
            (name, str(getattr(self, name))) for name in ("correlation", "rank_correlation", "same_sign")
        ]
        order = np.argsort(-np.abs(self.measured), kind="stable")[:20]
        rows = [
            (self.names[i], str(self.graph[i]), f"{self.predicted[i]:+.4g}", f"{self.measured[i]:+.4g}")
            for i in order
        ]
        head = ("feature", "graph", "predicted", "measured")
        caption = f"{len(self.names)} features ablated ({self.chosen}), intervals over {self.over}"
        return str(
            table(("prediction against the real model", "value, 95% interval"), scores, caption)
            + table(head, rows, "largest measured changes", numeric=(2, 3))
        )


@torch.no_grad()
def check_interventions(
    model: GPT,
    graphs: FeatureGraph | Sequence[FeatureGraph],
    transcoders: Mapping[str, Dictionary] | Iterable[Dictionary],
    *,
    n: int = 64,
    seed: int = 0,
    strongest: bool = False,
) -> Interventions:
    """Ablate ``n`` features of each graph in ``model``, one at a time; drawn at random, or the ``strongest``.

    UsageError when a graph is of another model or transcoders, or has no features.
    """
    graphs = [graphs] if isinstance(graphs, FeatureGraph) else list(graphs)
    ours = by_layer(model, transcoders.values() if isinstance(transcoders, Mapping) else transcoders)
    digests = (weights_digest(model), {f"blocks.{i}.mlp": weights_digest(d) for i, d in ours.items()})
    rng = np.random.default_rng(seed)
    number: list[int] = []
    names: list[str] = []
    predicted: list[np.ndarray] = []
    measured: list[np.ndarray] = []
    for i, graph in enumerate(graphs):
        if (graph.facts["model_digest"], graph.facts["transcoders"]) != digests:
            raise UsageError(f"graph {i} ({graph.prompt[:40]!r}) is of another model or other transcoders")
        features = np.flatnonzero(graph.kinds.features.numpy())
        if strongest:
            order = np.argsort(-graph.influence.numpy()[features], kind="stable")
        else:
            order = rng.permutation(len(features))
        rows = features[order[:n]].tolist()
        names += [graph.nodes[r].name for r in rows]
        number += [i] * len(rows)
        predicted.append(-graph.effects()[0, rows].numpy())
        measured.append(_ablated(model, graph, rows, ours))
    if not names:
        raise UsageError("the graphs have no active features: there is nothing to ablate")
    chosen = "the most influential" if strongest else f"drawn at random, seed {seed}"
    return Interventions(
        np.array(number), tuple(names), np.concatenate(predicted), np.concatenate(measured), chosen
    )


def _ablated(
    model: GPT, graph: FeatureGraph, rows: Sequence[int], transcoders: Mapping[int, Dictionary]
) -> np.ndarray:
    """Change [rows] of the first output when each of these features is taken out of the real model."""
    tokens = torch.tensor(graph.ids, device=model.device)
    first = int(graph.kinds.outputs.nonzero()[0])
    direction = directions(model, torch.tensor([graph.nodes[first].index], device=model.device))[0]
    made = np.zeros(len(rows))
    for layer, transcoder in transcoders.items():
        here = [i for i, r in enumerate(rows) if graph.nodes[r].layer == layer]
        for start in range(0, len(here), AT_ONCE):
            part = here[start : start + AT_ONCE]
            taken = [graph.nodes[rows[i]] for i in part]
            index = torch.tensor([t.index for t in taken], device=model.device)
            pos = torch.tensor([t.pos for t in taken], device=model.device)
            values = torch.tensor([t.activation for t in taken], dtype=torch.float64, device=model.device)
            writes = values[:, None] * transcoder.W_dec[index].double() / transcoder.scale_out.double()
            logits = _run(model, tokens.expand(len(part) + 1, -1), layer, pos, writes) @ direction
            made[part] = (logits[1:] - logits[0]).cpu().numpy()  # the first row is left alone
    return made


def _run(model: GPT, tokens: Tensor, layer: int, pos: Tensor, writes: Tensor) -> Tensor:
    """What the head reads at the last position [1 + n, D], with ``writes`` [n, D] taken out of rows 1..n."""

    def take(x: Tensor) -> Tensor:
        x = x.clone()
        x[torch.arange(1, len(x), device=x.device), pos] -= writes.to(x.dtype)
        return x

    was = model.training
    model.eval()
    try:
        with Taps(read=["final_norm"], edit={f"blocks.{layer}.mlp_out": take}) as taps:
            model(tokens, taps)
            return taps["final_norm"][:, -1].double()
    finally:
        model.train(was)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: np.ndarray = (last - (counts - 1) / 2)[where]
    return middle


def _rank(a: np.ndarray, b: np.ndarray) -> float:
    return _pearson(_ranks(a), _ranks(b))


def _sign(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.sign(a) == np.sign(b)).mean())


_STATISTICS = {"correlation": _pearson, "rank": _rank, "sign": _sign}
