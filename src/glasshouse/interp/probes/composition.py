"""Does the model compute "A and B" from A and from B? Where, and by which components?

Three things are asked of a hypothesis over a grid of combinations. What it answers: right on pairs never
seen, and by more than a sum of a score per word. Where: at which sites A, B and their combination can each be
exchanged between runs with the effect that the hypothesis predicts. By what: which heads and MLPs bring A and
B to the place where the combination is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.interp.probes.alignment import Accuracy, accuracy, align, random_alignment
from glasshouse.interp.probes.carriers import Carried, carriers
from glasshouse.interp.probes.grid import (
    Grid,
    Interchanges,
    Variable,
    all_margins,
    combination_score,
    interchanges,
    read,
)
from glasshouse.interp.probes.show import composition_html, composition_text
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest

ALIGNED = 0.9  # interchange accuracy from which a variable counts as found; chance is 0.5
COMBINED = 0.5  # share of the truth table's own combination from which a coordinate counts as combined
VARIABLES: tuple[Variable, ...] = ("a", "b", "both")


@dataclass(frozen=True)
class SiteFinding:
    """One site: interchange accuracy of each variable on held-out combinations, beside a random rotation's.

    ``combination``: how much of the combination the coordinate of "both" holds (0: a sum over words, 1: as
    the truth table). ``random`` averages over rotations (``n`` counts them).
    ``direction`` [d]: that coordinate. ``overlap``: largest cosine between the subspaces of A and of B.
    """

    found: Mapping[Variable, Accuracy]
    random: Mapping[Variable, Score]
    combination: Score
    overlap: float
    direction: Tensor

    @property
    def holds(self) -> bool:
        """Whether the combination stands here as one variable."""
        return self.found["both"].all.value >= ALIGNED and self.combination.value >= COMBINED

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the direction."""
        return {
            "found": {v: asdict(a) for v, a in self.found.items()},
            "random": {v: asdict(s) for v, s in self.random.items()},
            "combination": asdict(self.combination),
            "overlap": self.overlap,
        }


@dataclass(frozen=True)
class CompositionReport:
    """Whether, where and by what a model combines two variables. Shows itself in a notebook.

    ``seen``, ``unseen``: share of the grid's pairs answered as the hypothesis says, held-out pairs apart.
    ``combination``: of the answer's margin, see ``grid.combination``. ``formed``: the first site, in the
    order of computation, that holds the combination; ``parts``: the last before it that holds A alone, and B.
    ``shuffled``: interchange accuracy there of a rotation
    fitted and tested with every word's class dealt anew (chance 1/2). ``carried``: by variable and component.
    """

    seen: Score
    unseen: Score
    combination: Score
    sites: Mapping[str, SiteFinding]
    formed: str | None
    parts: Mapping[Variable, str | None]
    shuffled_at: str
    shuffled: Mapping[Variable, Accuracy]
    carried: Mapping[Variable, Mapping[str, Carried]]
    model_digest: str

    @property
    def composes(self) -> bool:
        """Right on pairs never seen, by combination, which some site holds."""
        right = self.unseen.value >= ALIGNED
        return right and self.combination.value >= COMBINED and self.formed is not None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "composes": self.composes,
            "seen": asdict(self.seen),
            "unseen": asdict(self.unseen),
            "combination": asdict(self.combination),
            "formed": self.formed,
            "parts": dict(self.parts),
            "sites": {s: f.to_dict() for s, f in self.sites.items()},
            "shuffled": {"site": self.shuffled_at, **{v: asdict(a) for v, a in self.shuffled.items()}},
            "carried": {v: {c: asdict(s) for c, s in by.items()} for v, by in self.carried.items()},
            "thresholds": {"aligned": ALIGNED, "combined": COMBINED},
            "model_digest": self.model_digest,
        }

    def __str__(self) -> str:
        return composition_text(self)

    def _repr_html_(self) -> str:
        return composition_html(self)


def composition_report(
    model: GPT,
    grid: Grid,
    sites: Sequence[str] | None = None,
    *,
    widths: Mapping[Variable, int] | None = None,
    steps: int = 80,
    n: int = 256,
    n_random: int = 5,
    seed: int = 0,
) -> CompositionReport:
    """Test the hypothesis of ``grid`` on ``model``, at ``sites``, named as ``Grid`` says.

    Default sites: the residual stream where the answer is read, and its start and every layer's end at the
    other places of the grid. ``widths``: coordinates for each variable (default: its classes less one, 1 for
    both). For A, B and their combination a rotation each is learned in ``steps`` updates on pairs not held
    out; ``n`` interchanges of held-out pairs judge them, beside ``n_random`` random rotations.
    UsageError for a site that does not exist, rows beyond the context, or widths that do not fit;
    VerificationError for NaN and for grids in which nothing can be tested.
    """
    sites = _checked(model, grid, sites)
    own: dict[Variable, int] = {"a": len(grid.truth) - 1, "b": grid.truth.shape[1] - 1, "both": 1}
    own |= dict(widths or {})
    margin = all_margins(model, grid)
    right = (margin > 0) == grid.label
    tests = {v: interchanges(grid, v, n, held=True, seed=seed) for v in VARIABLES}
    found: dict[str, SiteFinding] = {}
    for site in sites:
        found[site] = _finding(model, grid, site, own, tests, steps, n_random, seed)
    formed = next((s for s, f in found.items() if f.holds), None)
    earlier = list(found)[: list(found).index(formed)] if formed else list(found)
    parts: dict[Variable, str | None] = {
        v: next((s for s in reversed(earlier) if found[s].found[v].all.value >= ALIGNED), None)
        for v in ("a", "b")
    }
    control = formed or max(found, key=lambda s: found[s].found["both"].all.value)
    other = grid.dealt_anew(seed)
    anew = {v: interchanges(other, v, n, held=True, seed=seed) for v in VARIABLES}
    shuffled = _aligned(model, other, control, own, anew, steps, seed, read(model, grid, control))[0]
    line = found[formed].direction if formed else None
    carried: dict[Variable, dict[str, Carried]] = {
        v: carriers(model, grid, v, site=formed, direction=line, seed=seed) for v in ("a", "b")
    }
    return CompositionReport(
        rate(int(right[~grid.held].sum()), int((~grid.held).sum())),
        rate(int(right[grid.held].sum()), int(grid.held.sum())),
        combination_score(margin, grid, seed),
        found,
        formed,
        parts,
        control,
        shuffled,
        carried,
        weights_digest(model),
    )


def _checked(model: GPT, grid: Grid, sites: Sequence[str] | None) -> list[str]:
    """The sites in the order of computation."""
    every = model.sites()
    for where in sites or ():
        site = grid.place(where)[0]
        if site not in every:
            raise UsageError(f"no site {site!r} in this model.{suggest(site, every)} model.sites() lists all")
    if grid.tokens.shape[2] > model.config.context:
        raise UsageError(
            f"the grid's rows have {grid.tokens.shape[2]} tokens, but the model's context is "
            f"{model.config.context}"
        )
    if not model.config.causal and len(grid.at.unique()) > 1:
        raise UsageError("rows are padded on the right, which a model that is not causal would see")
    chosen = sites or [
        *(f"{s}@{p}" for s in every if s == "embed" or s.endswith("resid_post") for p in grid.places),
        *(s for s in every if s.endswith(("resid_mid", "resid_post"))),
    ]
    return sorted(chosen, key=lambda where: every.index(grid.place(where)[0]))


def _finding(
    model: GPT,
    grid: Grid,
    site: str,
    widths: Mapping[Variable, int],
    tests: Mapping[Variable, Interchanges],
    steps: int,
    n_random: int,
    seed: int,
) -> SiteFinding:
    acts = read(model, grid, site)
    found, bases = _aligned(model, grid, site, widths, tests, steps, seed, acts)
    strays: dict[Variable, list[float]] = {v: [] for v in VARIABLES}
    for i in range(n_random):
        drawn = random_alignment(site, acts.shape[1], widths, 1000 * seed + i)
        for v in VARIABLES:
            strays[v].append(accuracy(model, grid, site, acts, drawn.bases[v], tests[v]).all.value)
    kept, label = (~grid.held).flatten(), grid.label.flatten()
    gap = acts[kept & label].mean(0) - acts[kept & ~label].mean(0)
    line = bases["both"] @ (bases["both"].T @ gap)  # of one coordinate: that one, from no to yes
    overlap = float(torch.linalg.matrix_norm(bases["a"].T @ bases["b"], 2))
    level = (acts @ line).view(grid.at.shape)
    random: dict[Variable, Score] = {v: bootstrap(x) for v, x in strays.items()}
    return SiteFinding(found, random, combination_score(level, grid, seed), overlap, line)


def _aligned(
    model: GPT,
    grid: Grid,
    site: str,
    widths: Mapping[Variable, int],
    tests: Mapping[Variable, Interchanges],
    steps: int,
    seed: int,
    acts: Tensor,
) -> tuple[dict[Variable, Accuracy], dict[Variable, Tensor]]:
    """Accuracy of each variable in the basis learned for it, and that basis."""
    made = {v: align(model, grid, site, {v: widths[v]}, steps=steps, seed=seed, acts=acts) for v in VARIABLES}
    bases = {v: m.bases[v] for v, m in made.items()}
    return {v: accuracy(model, grid, site, acts, bases[v], tests[v]) for v in VARIABLES}, bases
