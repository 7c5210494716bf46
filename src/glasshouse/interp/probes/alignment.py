"""Distributed alignment search: which subspace at a site plays the part of a variable of the hypothesis?

Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
representations". A rotation is learned such that exchanging a few of its coordinates between two runs changes
the answer as exchanging the variable should; it is judged on combinations that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.rng import seed_from
from glasshouse.base.score import Score, rate
from glasshouse.interp.probes.grid import BATCH, Grid, Interchanges, Variable, interchanges, margins, read
from glasshouse.model import GPT


@dataclass(frozen=True)
class Alignment:
    """Orthonormal bases [d, k] at ``site``, by variable; ``a`` and ``b`` are orthogonal to each other."""

    site: str
    bases: Mapping[Variable, Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Interchange-intervention accuracy on held-out combinations; chance is 1/2 in ``all``.

    ``moved``: of the interchanges whose answer should change; ``still``: of those where it should stay.
    """

    all: Score
    moved: Score
    still: Score


def align(
    model: GPT,
    grid: Grid,
    site: str,
    widths: Mapping[Variable, int],
    *,
    steps: int = 80,
    lr: float = 0.1,
    batch: int = 64,
    seed: int = 0,
    acts: Tensor | None = None,
) -> Alignment:
    """Learn one rotation for the variables of ``widths`` together, each its own coordinates.

    Trained by the log-loss of the answer after each interchange, on cells that are not held out; the model is
    frozen. ``acts`` [cells, d]: activations at the site, if read already. UsageError when the coordinates
    exceed the width.
    """
    acts = read(model, grid, site) if acts is None else acts
    d, k = acts.shape[1], sum(widths.values())
    if not 0 < k <= d:
        raise UsageError(f"{site!r} is {d} wide; it has no {k} coordinates to align")
    torch_rng = torch.Generator().manual_seed(seed_from("rotation", site, seed))
    free = torch.linalg.qr(torch.randn(d, k, generator=torch_rng))[0]
    pairs = {v: interchanges(grid, v, 32 * batch, held=False, seed=seed) for v in widths}
    with torch.enable_grad():
        free.requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=lr)
        for step in range(steps):
            bases = blocks(torch.linalg.qr(free)[0], widths)
            rows = torch.randint(0, 32 * batch, (batch,), generator=torch_rng)
            made = [mixed(acts[p.base[rows]], acts[p.source[rows]], bases[v]) for v, p in pairs.items()]
            cells = torch.cat([p.base[rows] for p in pairs.values()])
            z = exchanged(model, grid, site, cells, torch.cat(made))
            y = torch.cat([p.label[rows] for p in pairs.values()]).to(z)
            loss = F.binary_cross_entropy_with_logits(z, y)
            (free.grad,) = torch.autograd.grad(loss, [free])  # the model's own gradients stay untouched
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.step()
    return Alignment(site, blocks(torch.linalg.qr(free.detach())[0], widths))


def blocks(rotation: Tensor, widths: Mapping[Variable, int]) -> dict[Variable, Tensor]:
    """The columns [d, k] of each variable, in the order of ``widths``."""
    return dict(zip(widths, rotation.split(list(widths.values()), dim=1), strict=True))


def random_alignment(site: str, d: int, widths: Mapping[Variable, int], seed: int) -> Alignment:
    """A rotation drawn evenly (Haar), of the same shape: the control."""
    torch_rng = torch.Generator().manual_seed(seed_from("random rotation", site, seed))
    drawn = torch.randn(d, sum(widths.values()), generator=torch_rng)
    return Alignment(site, blocks(torch.linalg.qr(drawn)[0], widths))


def mixed(base: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    """``base`` [n, d] with the component in ``basis`` [d, k] of ``source`` [n, d]."""
    return base + (source - base) @ basis @ basis.T


def exchanged(model: GPT, grid: Grid, where: str, base: Tensor, vectors: Tensor) -> Tensor:
    """Answer margins [n] of ``base`` cells [n] with ``vectors`` [n, d] put in at ``where``."""
    site, place = grid.place(where)
    at, rows = place[base].to(model.device), torch.arange(len(base), device=model.device)

    def edit(x: Tensor) -> Tensor:
        return x.index_put((rows, at), vectors.to(x))

    return margins(model, grid, base, {site: edit})


@torch.no_grad()
def accuracy(
    model: GPT,
    grid: Grid,
    site: str,
    acts: Tensor,
    basis: Tensor,
    pairs: Interchanges,
) -> Accuracy:
    """How often interchanges in ``basis`` [d, k] give the answer of the hypothesis."""
    right = []
    for rows in torch.arange(len(pairs.base)).split(BATCH):
        base, source = pairs.base[rows], pairs.source[rows]
        z = exchanged(model, grid, site, base, mixed(acts[base], acts[source], basis))
        right.append((z.cpu() > 0) == pairs.label[rows])
    ok, flip = torch.cat(right), pairs.moved

    def score(rows: Tensor) -> Score:
        return rate(int(rows.sum()), len(rows))

    return Accuracy(score(ok), score(ok[flip]), score(ok[~flip]))
