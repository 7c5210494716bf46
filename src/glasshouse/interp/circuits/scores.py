"""Scores of all edges by one method, with everything that must stand beside them; and how to get them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from markupsafe import Markup

from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score
from glasshouse.draw import STYLE, Bar, bars, esc
from glasshouse.interp.circuits.acdc import prune_greedily
from glasshouse.interp.circuits.attribution import eap, eap_ig
from glasshouse.interp.circuits.circuit import About, Circuit
from glasshouse.interp.circuits.exact import edge_effects
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.circuits.masks import optimise_masks
from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.probe import auroc


@dataclass(frozen=True)
class EdgeScores:
    """A score for every edge: higher by size = matters more; positive = the behaviour leans on it.

    ``values`` float64 [edge] in the order of ``graph.edges``. ``chosen`` bool [edge]: what the method itself
    takes to be the circuit (None for methods that only rank).
    """

    graph: Graph
    values: np.ndarray
    about: About
    chosen: np.ndarray | None = None

    def __getitem__(self, edge: str) -> float:
        return float(self.values[self.graph.find([edge])[0]])

    def circuit(
        self,
        n_edges: int | None = None,
        *,
        threshold: float | None = None,
        absolute: bool = True,
        greedy: bool = False,
        prune: bool = False,
    ) -> Circuit:
        """The ``n_edges`` highest scores, or all of at least ``threshold``, or what the method chose.

        ``absolute``: by size, else signed. ``greedy``: grown from the logits (`Graph.greedy`). ``prune``:
        drop edges on no path from an embedding to the logits. UsageError when not exactly one choice is made.
        """
        size = np.abs(self.values) if absolute else self.values
        if n_edges is not None and threshold is None:
            if not 0 < n_edges <= len(size):
                raise UsageError(f"a circuit has 1 to {len(size)} edges, not {n_edges}")
            pick = self.graph.greedy if greedy else self.graph.top
            kept = pick(self.values, n_edges, absolute=absolute)
        elif threshold is not None and n_edges is None:
            kept = size >= threshold
        elif self.chosen is not None and threshold is None:
            kept = self.chosen
        else:
            raise UsageError("give either n_edges or threshold: how many edges, or from which score on")
        return Circuit(self.graph, self.values, self.graph.prune(kept) if prune else kept, self.about)

    def auroc(
        self, known: Iterable[str | Sequence[str]], candidates: Iterable[str | Sequence[str]] | None = None
    ) -> Score:
        """How well |score| separates ``known`` edges from the other ``candidates`` (default: all edges).

        Area under the ROC curve (ties count half), interval over edges. UsageError for unknown edges.
        """
        among = np.arange(len(self.values)) if candidates is None else np.unique(self.graph.find(candidates))
        labels = np.isin(among, self.graph.find(known))
        found = auroc(np.abs(self.values[among]), labels)
        return Score(found.value, found.low, found.high, found.n)

    def agreement(self, other: EdgeScores) -> float:
        """Rank correlation (Spearman 1904) of the sizes of two scores; ties share their mean rank.

        UsageError for another shape of model, or when all sizes of one are equal.
        """
        if other.graph != self.graph:
            raise UsageError("scores of different shapes of model cannot be compared")
        a, b = (_ranks(np.abs(s.values)) for s in (self, other))
        if a.std() == 0 or b.std() == 0:
            raise UsageError("all scores of one method are equal; there are no ranks to compare")
        return float(np.corrcoef(a, b)[0, 1])

    def _repr_html_(self) -> str:
        best = self.graph.top(self.values, 20).nonzero()[0]
        best = best[np.argsort(-np.abs(self.values[best]), kind="stable")]
        rows = [Bar(self.graph.edges[i], float(self.values[i])) for i in best]
        picture = bars(rows, "The strongest edges", str(self.about))
        return str(
            Markup("<style>{}</style><div>{}{}</div>").format(Markup(STYLE), picture, esc(str(self.about)))
        )


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean of their places for equal values."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2
    return np.asarray(middle[place])


class Method(Protocol):
    """A way to score edges: values [edge], and the edges chosen [edge] if the method decides that."""

    def __call__(self, patcher: Patcher, **settings: Any) -> tuple[np.ndarray, np.ndarray | None]: ...


def _exact(patcher: Patcher, **settings: Any) -> tuple[np.ndarray, np.ndarray | None]:
    cut = edge_effects(patcher, **settings).double()
    return (patcher.clean.cpu().double() - cut).mean(1).numpy(), None


def _acdc(patcher: Patcher, **settings: Any) -> tuple[np.ndarray, np.ndarray | None]:
    kept, cost = prune_greedily(patcher, **settings)
    return cost, kept


METHODS: Mapping[str, Method] = {
    "exact": _exact,
    "eap": lambda patcher, **settings: (eap(patcher, **settings), None),
    "eap-ig": lambda patcher, **settings: (eap_ig(patcher, **settings), None),
    "eap-ig-activations": lambda patcher, **settings: (
        eap_ig(patcher, along="activations", **settings),
        None,
    ),
    "acdc": _acdc,
    "masks": lambda patcher, **settings: (optimise_masks(patcher, **settings), None),
}


def score_edges(patcher: Patcher, method: str = "eap-ig", **settings: Any) -> EdgeScores:
    """Score every edge of a model for the behaviour that ``patcher`` holds.

    | method               | what it is                                             | settings              |
    |----------------------|--------------------------------------------------------|-----------------------|
    | `exact`              | each edge cut alone, by forward passes                  |                       |
    | `eap`                | first order, one pass forward and back                 |                       |
    | `eap-ig`             | gradients on the way between the runs' embeddings      | steps                 |
    | `eap-ig-activations` | gradients on the way of every node's own output        | steps                 |
    | `acdc`               | greedy pruning; also decides which edges stay          | threshold             |
    | `masks`              | gates trained to close (subnetwork probing)            | gate, level, steps... |

    UsageError for an unknown method or setting.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UsageError(f"no method {method!r}.{suggest(method, METHODS)} There are {known}")
    began = time.perf_counter()
    try:
        values, chosen = METHODS[method](patcher, **settings)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise UsageError(f"{method}: {error}") from error
    about = patcher.about(method, settings, time.perf_counter() - began)
    return EdgeScores(patcher.graph, np.asarray(values, dtype=np.float64), about, chosen)


def pooled(parts: Sequence[EdgeScores]) -> EdgeScores:
    """Scores of one method on several sets of rows, as if on all rows together: means weighted by n.

    For rows of unequal length, which need a contrast for each length. Edges that the method chose on any part
    are chosen. UsageError when shapes, models, methods or ablations differ.
    """
    if not parts:
        raise UsageError("nothing to pool")
    first = parts[0]
    for part in parts[1:]:
        same = [(p.graph, p.about.method, p.about.ablation, p.about.model) for p in (first, part)]
        if same[0] != same[1]:
            raise UsageError("only scores of one model, one method and one ablation can be pooled")
    n = sum(p.about.n for p in parts)
    values = np.sum([p.values * (p.about.n / n) for p in parts], axis=0)
    chosen = [p.chosen for p in parts if p.chosen is not None]
    data, seconds = digest_of([p.about.data for p in parts]), sum(p.about.seconds for p in parts)
    about = replace(first.about, n=n, data=data, seconds=seconds)
    return EdgeScores(first.graph, values, about, np.any(chosen, axis=0) if chosen else None)
