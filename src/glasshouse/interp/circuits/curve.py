"""MIB's two numbers for a ranking of edges: CPR and CMD (Mueller et al. 2025, arXiv 2504.13151, sec. 3).

For each fraction p of .001 .002 .005 .01 .02 .05 .1 .2 .5 1, the circuit is the int(p * edges) highest
scores, pruned to what connects embeddings with logits; f(p) = (m(C) - m(0)) / (m(N) - m(0)). CPR is the area
under f, CMD that under |1 - f|, both by trapezoids over p itself from .001 to 1 (so a perfect circuit has CPR
0.999 and CMD 0). CPR ranks edges by signed score (an edge that harms comes last), CMD by size, as the
benchmark's runs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import STYLE, Axes, Series, esc, line_chart
from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.circuits.scores import EdgeScores

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """A ranking's faithfulness at every fraction, and its areas.

    ``signed`` and ``by_size``: f at each of `FRACTIONS`, edges ranked by score or by its size. ``sizes``:
    edges in the pruned circuits by size. ``cpr`` and ``cmd``: intervals from resampling rows;
    ``random_cpr`` and ``random_cmd``: rankings by chance, n of them.
    """

    signed: tuple[float, ...]
    by_size: tuple[float, ...]
    sizes: tuple[int, ...]
    cpr: Score
    cmd: Score
    random_cpr: Score
    random_cmd: Score
    about: str

    def __str__(self) -> str:
        return (
            f"CPR {self.cpr} (random {self.random_cpr}), CMD {self.cmd} (random {self.random_cmd}); "
            f"{self.about}"
        )

    def _repr_html_(self) -> str:
        lines = [
            Series("by score", list(zip(FRACTIONS, self.signed, strict=True)), 0, "both"),
            Series("by size", list(zip(FRACTIONS, self.by_size, strict=True)), 1, "both"),
        ]
        axes = Axes(x_label="share of edges", y_label="recovered", x_range=(0.0, 1.0))
        picture = line_chart(lines, "What the best edges recover", str(self), axes)
        return str(Markup("<style>{}</style><div>{}{}</div>").format(Markup(STYLE), picture, esc(str(self))))


def area(f: np.ndarray) -> np.ndarray:
    """Area [...] under values [..., fraction] at `FRACTIONS`, by trapezoids."""
    steps = np.diff(FRACTIONS)
    return np.asarray((steps * (f[..., 1:] + f[..., :-1]) / 2).sum(-1))


def mib_curve(
    patcher: Patcher, scores: EdgeScores, *, greedy: bool = False, random: int = 5, seed: int = 0
) -> Curve:
    """Measure a ranking as MIB does; ``greedy`` grows circuits from the logits instead of taking the top.

    ``random`` rankings by chance stand beside it. UsageError for scores of another shape of model.
    """
    if scores.graph != patcher.graph:
        raise UsageError("the scores are of another shape of model than the patcher's")
    rng = generator("random rankings", seed)
    chance = rng.standard_normal((random, len(scores.values)))
    by_size, kept = _measured(patcher, scores.values, True, greedy)
    signed, _ = _measured(patcher, scores.values, False, greedy)
    drawn = [_recovered(patcher, _measured(patcher, c, True, greedy)[0]) for c in chance]
    rows = np.arange(len(patcher), dtype=np.float64)
    return Curve(
        signed=tuple(_recovered(patcher, signed).tolist()),
        by_size=tuple(_recovered(patcher, by_size).tolist()),
        sizes=tuple(int(k.sum()) for k in kept),
        cpr=bootstrap(rows, _of(patcher, signed, area)),
        cmd=bootstrap(rows, _of(patcher, by_size, lambda f: area(np.abs(1 - f)))),
        random_cpr=bootstrap([float(area(f)) for f in drawn]),
        random_cmd=bootstrap([float(area(np.abs(1 - f))) for f in drawn]),
        about=str(scores.about),
    )


def _measured(
    patcher: Patcher, values: np.ndarray, absolute: bool, greedy: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The metric [fraction, n] and the circuits bool [fraction, edge]."""
    graph = patcher.graph
    pick = graph.greedy if greedy else graph.top
    sizes = [int(p * len(graph.edges)) for p in FRACTIONS]
    kept = np.stack([graph.prune(pick(values, n, absolute=absolute)) for n in sizes])
    return patcher.measure(kept).double().numpy(), kept


def _recovered(patcher: Patcher, metric: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """f [fraction] of metrics [fraction, n], over some rows."""
    clean, empty = (x.double().cpu().numpy() for x in (patcher.clean, patcher.empty))
    if rows is not None:
        metric, clean, empty = metric[:, rows], clean[rows], empty[rows]
    return np.asarray((metric.mean(1) - empty.mean()) / (clean.mean() - empty.mean()))


def _of(
    patcher: Patcher, metric: np.ndarray, what: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], float]:
    """A statistic of row numbers, for `bootstrap`."""
    return lambda rows: float(what(_recovered(patcher, metric, rows.astype(np.int64))))
