"""Which heads and MLPs carry a variable to where the combination is formed, patched one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score
from glasshouse.interp.probes.grid import BATCH, Grid, Variable
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit


@dataclass(frozen=True)
class Carried:
    """Share of a variable's change that one component brings: 0 nothing, 1 all of it.

    ``site``: of the change of the combination's coordinate where it is formed (None when it is nowhere);
    ``answer``: of the change of the answer's margin.
    """

    answer: Score
    site: Score | None = None


def twins(grid: Grid, variable: Variable, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cells (base, source), at most ``n``, that differ in one word of ``variable`` and in the answer.

    Rows of unequal length are left out: their positions do not correspond. VerificationError without any.
    """
    a, b = torch.meshgrid(torch.arange(len(grid.class_a)), torch.arange(len(grid.class_b)), indexing="ij")
    number, pairs = a * len(grid.class_b) + b, []
    label, at = grid.label.flatten(), grid.at.flatten()
    for line in number.T if variable == "a" else number:  # cells that share the other variable's word
        base, source = (x.flatten() for x in torch.meshgrid(line, line, indexing="ij"))
        fits = (label[base] != label[source]) & (at[base] == at[source])
        pairs.append(torch.stack([base[fits], source[fits]]))
    found = torch.cat(pairs, 1)
    if not found.shape[1]:
        raise VerificationError(f"no two rows of equal length differ in {variable!r} and in the answer alone")
    chosen = generator("twins", variable, seed).permutation(found.shape[1])[:n]
    base, source = found[:, torch.from_numpy(chosen)]
    return base, source


@torch.no_grad()
def carriers(
    model: GPT,
    grid: Grid,
    variable: Variable,
    *,
    site: str | None = None,
    direction: Tensor | None = None,
    n: int = 128,
    seed: int = 0,
) -> dict[str, Carried]:
    """Every head ``a{layer}.h{head}`` and MLP ``m{layer}`` of the source run, put into the base run.

    Base and source differ in one word of ``variable`` and in the answer. ``site`` and ``direction`` [d]:
    where and along what the combination is formed, if anywhere. Intervals draw rows.
    """
    base, source = twins(grid, variable, n, seed)
    config = model.config
    names = [f"blocks.{i}.{s}" for i in range(config.n_layer) for s in ("z", "mlp_out")]
    parts = torch.arange(len(base)).split(BATCH)
    first = [_run(model, grid, base[rows], {}, site, direction) for rows in parts]
    last = [_run(model, grid, source[rows], {}, site, direction, names) for rows in parts]
    patches: dict[str, tuple[str, int | None]] = {}
    for i in range(config.n_layer):
        patches |= {f"a{i}.h{h}": (f"blocks.{i}.z", h) for h in range(config.n_head)}
        patches[f"m{i}"] = (f"blocks.{i}.mlp_out", None)
    out: dict[str, Carried] = {}
    for name, (where, head) in patches.items():
        done = [
            _run(model, grid, base[rows], {where: _put(there[2][where], head)}, site, direction)
            for rows, there in zip(parts, last, strict=True)
        ]
        shares = []
        for i in range(1 if site is None else 2):  # the answer's margin, and the coordinate at the site
            x0, x1, x = (torch.cat([run[:2][i] for run in runs]) for runs in (first, last, done))
            shares.append(_share(x0, x1, x, seed))
        out[name] = Carried(*shares)
    return out


def _put(source: Tensor, head: int | None) -> Edit:
    """The source's activation in place: one head of [n, head, pos, d_head], or all of [n, pos, d]."""

    def edit(x: Tensor) -> Tensor:
        if head is None:
            return source
        x = x.clone()
        x[:, head] = source[:, head]
        return x

    return edit


def _run(
    model: GPT,
    grid: Grid,
    n: Tensor,
    edit: Mapping[str, Edit],
    site: str | None,
    direction: Tensor | None,
    keep: list[str] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Margin [n], coordinate at the site [n] (empty without one), and the activations kept."""
    tokens, at = grid.rows(n)
    rows, level = torch.arange(len(n)), torch.empty(0)
    where, place = grid.place(site) if site else ("", at)
    with Taps(read=[*(keep or []), *([where] if site else [])], edit=edit) as taps:
        hidden = model.hidden(tokens.to(model.device), taps)
    margin = grid.margin(model.unembed(hidden[rows, at]).float()).cpu()
    if site is not None and direction is not None:
        level = taps[where][rows, place[n]].float().cpu() @ direction
    return margin, level, {name: taps[name] for name in keep or []}


def _share(base: Tensor, source: Tensor, patched: Tensor, seed: int, draws: int = 200) -> Score:
    """Least-squares share of the change from ``base`` to ``source`` [n] that ``patched`` [n] makes."""
    moved, whole = ((x - base).double().numpy() for x in (patched, source))
    if float(whole @ whole) < 1e-12:
        raise VerificationError("the source runs differ from the base runs in nothing; no share can be told")
    rng, n = generator("shares", seed), len(whole)
    rows = rng.integers(n, size=(draws, n))
    found = (moved * whole)[rows].sum(1) / np.maximum((whole * whole)[rows].sum(1), 1e-12)
    value = float(moved @ whole) / float(whole @ whole)
    low, high = np.quantile(found, [0.025, 0.975])
    return Score(value, min(value, float(low)), max(value, float(high)), n)
