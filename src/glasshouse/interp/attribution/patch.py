"""Activation patching and ablation, exactly: one forward pass for each change, many changes in a pass.

Interchange after Vig et al. (2020) and Meng et al. (2022); which way round after Heimersheim & Nanda (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.interp.attribution.effects import Effects, describe, effects
from glasshouse.interp.attribution.places import Place, resolve
from glasshouse.interp.attribution.rerun import (
    SEQUENCES,
    base_run,
    changed,
    check_rows,
    put_edits,
    read,
    row_chunks,
)
from glasshouse.interp.metric import Contrast, Metric
from glasshouse.model import GPT, Taps

Direction = Literal["denoise", "noise"]
Ablation = Literal["zero", "mean", "resample"]
WAYS = {"denoise": "clean into corrupt", "noise": "corrupt into clean"}


def check_way(direction: str) -> None:
    """UsageError for a direction that is not one."""
    if direction not in WAYS:
        raise UsageError(
            f"direction must be 'denoise' or 'noise', not {direction!r}{suggest(direction, WAYS)}"
        )


@torch.no_grad()
def patch_activations(
    model: GPT,
    contrast: Contrast,
    places: Iterable[Place | str] | None = None,
    *,
    direction: Direction = "denoise",
    sequences: int = SEQUENCES,
) -> Effects:
    """The effect of exchanging each place's activation between clean and corrupt rows.

    ``denoise`` puts the clean run's activation into the corrupt run: how much of the behaviour comes back.
    ``noise`` puts the corrupt run's into the clean run: how much of it is lost. Either way 1 is all of the
    gap between clean and corrupt. ``places`` (None: every head and MLP) as `components`, `stream` or
    `attention_inputs` list them, or their names. ``sequences``: rows in one forward pass.
    UsageError for an unknown place, rows that do not fit the model, or a metric that does not tell the rows
    apart.
    """
    check_way(direction)
    clean, corrupt = check_rows(model, contrast.clean), check_rows(model, contrast.corrupt)
    chosen = resolve(places, model, clean.shape[1])
    sites = sorted({p.site for p in chosen})
    moved, gaps = [], []
    for rows in row_chunks(len(contrast), sequences):
        good = base_run(model, clean[rows], contrast.metric, rows)
        bad = base_run(model, corrupt[rows], contrast.metric, rows)
        base, giver, sign = (bad, good, 1) if direction == "denoise" else (good, bad, -1)
        source = read(model, giver.tokens, sites)
        found = changed(model, base, contrast.metric, chosen, source, sequences)
        moved.append(sign * (found - base.values))
        gaps.append(good.values - bad.values)
    method = f"activation patching, {WAYS[direction]} (interchange, exact)"
    return effects(chosen, torch.cat(moved, 1), method, contrast.metric, torch.cat(gaps))


@torch.no_grad()
def ablate(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    places: Iterable[Place | str] | None = None,
    *,
    kind: Ablation = "mean",
    together: bool = False,
    reference: Tensor | None = None,
    seed: int = 0,
    sequences: int = SEQUENCES,
) -> Effects:
    """How much of the metric is lost, in its own units, when each place is ablated in turn.

    ``tokens`` int64 [n, pos]. ``kind``: "zero"; "mean" over the rows of ``reference`` (default ``tokens``) at
    each position; "resample", another row of ``reference`` drawn by ``seed`` for each row. ``together``: all
    places at once, one effect: parts that stand in for each other each lose nothing alone. UsageError as
    `patch_activations`, and for a mean or a sample of a single row.
    """
    tokens = check_rows(model, tokens)
    chosen = resolve(places, model, tokens.shape[1])
    source, about = _sources(model, tokens, chosen, kind, reference, seed)
    lost = []
    for rows in row_chunks(len(tokens), sequences):
        base = base_run(model, tokens[rows], metric, rows)
        put = {s: x[rows] if len(x) > 1 else x.expand(len(rows), *x.shape[1:]) for s, x in source.items()}
        if together:
            with Taps(edit=put_edits([(slice(None), p) for p in chosen], put)) as taps:
                found = metric(model(tokens[rows], taps), rows)[None]
        else:
            found = changed(model, base, metric, chosen, put, sequences)
        lost.append(base.values - found)
    per_row = torch.cat(lost, 1)
    if not together:
        return effects(chosen, per_row, f"ablation, {about}", metric)
    name = "+".join(p.name for p in chosen)
    cell = (("together", "all"),)
    return Effects((name,), per_row.double(), f"ablation together, {about}", describe(metric), cell)


def _sources(
    model: GPT, tokens: Tensor, places: list[Place], kind: str, reference: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], str]:
    """What stands in for the activations of each site ([1, ...]: for all rows), and what to call it."""
    if kind not in ("zero", "mean", "resample"):
        known = ("zero", "mean", "resample")
        raise UsageError(f"ablation is 'zero', 'mean' or 'resample', not {kind!r}{suggest(kind, known)}")
    pool = tokens if reference is None else check_rows(model, reference)
    if pool.shape[1] != tokens.shape[1]:
        raise UsageError(f"reference rows have {pool.shape[1]} positions and the rows {tokens.shape[1]}")
    if kind != "zero" and len(pool) < 2:
        raise UsageError(f"{kind} ablation needs two or more reference rows, got {len(pool)}")
    acts = read(model, pool, sorted({p.site for p in places}))
    if kind == "zero":
        return {site: torch.zeros_like(x[:1]) for site, x in acts.items()}, "zero"
    if kind == "mean":
        return {site: x.mean(0, keepdim=True) for site, x in acts.items()}, f"mean of {len(pool)} rows"
    drawn = torch.Generator().manual_seed(seed)
    if reference is None:  # never the row itself
        step = torch.randint(1, len(pool), (len(tokens),), generator=drawn)
        other = (torch.arange(len(tokens)) + step) % len(pool)
    else:
        other = torch.randint(len(pool), (len(tokens),), generator=drawn)
    return {site: x[other] for site, x in acts.items()}, f"resampled from {len(pool)} rows (seed {seed})"
