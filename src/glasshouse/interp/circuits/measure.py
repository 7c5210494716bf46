"""What a circuit is worth: how much of the behaviour it keeps alone, how much goes with it, and whether every
edge is needed; always beside random circuits of equal size.

With m(N) the mean metric of the whole model, m(0) with every edge cut and m(C) with all but the circuit's
edges cut, what a circuit recovers is f = (m(C) - m(0)) / (m(N) - m(0)). Intervals come from resampling rows,
or random circuits; each says what its n counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.draw.table import table
from glasshouse.interp.circuits.ablation import Ablation, Kind
from glasshouse.interp.circuits.circuit import Circuit
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.metric import Contrast, at_positions
from glasshouse.model import GPT


@dataclass(frozen=True)
class Faithfulness:
    """What a circuit does, measured.

    ``recovered``: f of the circuit alone (n rows). ``left``: f of the model without the circuit's edges (n
    rows). ``kl``: nats between the whole model's prediction and the circuit's (n rows). ``random`` and
    ``random_left``: the same two for random circuits of equal size (mean, n circuits); ``beaten``: share of
    random circuits that recover less. ``ablation``, ``size``, ``edges`` in all; ``same_model``: whether the
    circuit was found on this very model.
    """

    recovered: Score
    left: Score
    kl: Score
    random: Score
    random_left: Score
    beaten: Score
    ablation: str
    size: int
    edges: int
    same_model: bool

    def _rows(self) -> list[list[str]]:
        return [
            ["circuit alone recovers", str(self.recovered)],
            [f"random circuits of {self.size} edges recover", str(self.random)],
            ["random circuits that recover less", str(self.beaten)],
            ["left without the circuit", str(self.left)],
            ["left without random circuits", str(self.random_left)],
            ["KL(model || circuit), nats", str(self.kl)],
        ]

    def __str__(self) -> str:
        note = "" if self.same_model else "; another model than it was found on"
        head = f"{self.size} of {self.edges} edges, ablation {self.ablation}{note}"
        return "\n".join([head, *(f"{name}: {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        head = f"{self.size} of {self.edges} edges, {self.ablation}"
        return str(table([head, "value"], self._rows(), "A circuit's faithfulness", numeric=(1,)))


def random_circuits(
    graph: Graph, n_edges: int, count: int, seed: int = 0, *, connected: bool = True
) -> np.ndarray:
    """bool [count, edge]: random circuits of ``n_edges`` edges.

    ``connected``: grown from the logits (`Graph.greedy` on random scores), which is the harder comparison:
    every edge leads to the output. Otherwise any edges of the model, each as likely as another.
    """
    rng = generator("random circuits", seed)
    pick = graph.greedy if connected else graph.top
    return np.stack([pick(rng.random(len(graph.edges)), n_edges) for _ in range(count)])


def recovered(patcher: Patcher, kept: np.ndarray) -> np.ndarray:
    """f [sets] of edge sets ``kept`` bool [sets, edge]."""
    return (patcher.measure(kept).double().mean(1).numpy() - _mean(patcher.empty)) / patcher.gap


def faithfulness(
    patcher: Patcher, circuit: Circuit, *, random: int = 20, seed: int = 0, connected: bool = True
) -> Faithfulness:
    """Measure a circuit, beside ``random`` random ones of equal size (`random_circuits`).

    Rows should be others than those it was found on (`Contrast.halves`). UsageError for an empty circuit or
    one of another shape of model.
    """
    same = circuit.fits(patcher.model)
    if not len(circuit) > 0 or circuit.graph != patcher.graph:
        raise UsageError("the circuit has no edges, or its input nodes are other ones than the patcher's")
    others = random_circuits(patcher.graph, len(circuit), random, seed, connected=connected)
    metric = patcher.measure(np.concatenate([[circuit.kept], [~circuit.kept], others, ~others]))
    share = (metric[2:].double().mean(1).numpy() - _mean(patcher.empty)) / patcher.gap
    alone = row_score(patcher, metric[0])
    return Faithfulness(
        recovered=alone,
        left=row_score(patcher, metric[1]),
        kl=bootstrap(divergence(patcher, circuit.kept).numpy()),
        random=bootstrap(share[:random]),
        random_left=bootstrap(share[random:]),
        beaten=rate(int((share[:random] < alone.value).sum()), random),
        ablation=str(patcher.ablation),
        size=len(circuit),
        edges=len(patcher.graph.edges),
        same_model=same,
    )


def recheck(
    circuit: Circuit, model: GPT, contrast: Contrast, ablate: Ablation | Kind = "corrupt", *, random: int = 20
) -> Faithfulness:
    """Measure a saved circuit on another checkpoint of the same shape; ``same_model`` says if it is one."""
    patcher = Patcher(model, contrast, ablate, split_input=circuit.graph.split_input)
    return faithfulness(patcher, circuit, random=random)


def row_score(patcher: Patcher, metric: Tensor) -> Score:
    """f of an edge set whose metric by row is ``metric`` [n], its interval from resampling rows."""
    m, clean, empty = (x.double().cpu().numpy() for x in (metric, patcher.clean, patcher.empty))

    def share(rows: np.ndarray) -> float:
        i = rows.astype(np.int64)
        return float((m[i].mean() - empty[i].mean()) / (clean[i].mean() - empty[i].mean()))

    return bootstrap(np.arange(len(m)), share)


@torch.no_grad()
def divergence(patcher: Patcher, kept: np.ndarray) -> Tensor:
    """KL(whole model || edge set) [n] in nats: where the metric reads, or mean over positions computed."""
    rows = torch.arange(len(patcher))

    def predicted(edges: np.ndarray) -> Tensor:
        keep = torch.from_numpy(patcher.graph.matrix(edges[None])).to(patcher.live.device)
        logits = patcher.logits(keep)
        here = logits if patcher.at is None else at_positions(logits, patcher.at[rows])[:, None]
        return here.double().log_softmax(-1)

    whole, part = predicted(np.ones_like(kept)), predicted(kept)
    return F.kl_div(part, whole, reduction="none", log_target=True).sum(-1).mean(1).clamp(min=0).cpu()


@dataclass(frozen=True)
class Completeness:
    """Whether anything outside the circuit does the same work (Wang et al. 2022, arXiv 2211.00593, sec. 4).

    ``gap``: mean over random parts K of the circuit of |f(C without K) - f(model without K)|, n parts; 0 is
    complete. ``worst``: the largest.
    """

    gap: Score
    worst: float
    ablation: str


def completeness(patcher: Patcher, circuit: Circuit, *, parts: int = 20, seed: int = 0) -> Completeness:
    """Cut random parts of a circuit, each edge with chance 1/2, from the circuit and from the whole model."""
    if parts < 1:
        raise UsageError(f"completeness needs one part or more, not {parts}")
    rng = generator("completeness", seed)
    gone = circuit.kept & (rng.random((parts, len(circuit.kept))) < 0.5)
    f = recovered(patcher, np.concatenate([circuit.kept & ~gone, ~gone]))
    gaps = np.abs(f[:parts] - f[parts:])
    return Completeness(bootstrap(gaps), float(gaps.max()), str(patcher.ablation))


@dataclass(frozen=True)
class Minimality:
    """Whether every edge of a circuit is needed (Wang et al. 2022, sec. 4).

    ``effects``: for each edge v the largest |f(C without K) - f(C without K and v)| over no K and random
    parts K. ``needed``: share of edges whose effect is above ``tolerance``, n edges.
    """

    effects: dict[str, float]
    needed: Score
    tolerance: float
    ablation: str


def minimality(
    patcher: Patcher, circuit: Circuit, *, tolerance: float = 0.01, parts: int = 3, seed: int = 0
) -> Minimality:
    """Cut every edge of a circuit alone, from the circuit and from what random parts of it leave."""
    inside = np.flatnonzero(circuit.kept)
    if not len(inside):
        raise UsageError("an empty circuit has no edge to be needed")
    rng = generator("minimality", seed)
    effects = np.zeros(len(inside))
    for part in range(parts + 1):
        gone = circuit.kept & (rng.random(len(circuit.kept)) < 0.5) if part else np.zeros_like(circuit.kept)
        base = circuit.kept & ~gone
        sets = np.repeat(base[None], len(inside) + 1, axis=0)
        sets[np.arange(len(inside)), inside] = False
        f = recovered(patcher, sets)
        effects = np.maximum(effects, np.abs(f[:-1] - f[-1]))
    names = (patcher.graph.edges[i] for i in inside)
    by_name = dict(zip(names, effects.tolist(), strict=True))
    needed = rate(int((effects > tolerance).sum()), len(inside))
    return Minimality(by_name, needed, tolerance, str(patcher.ablation))


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
