"""Forward passes with one change each, many at a time, begun at the first layer that can differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution.places import Place
from glasshouse.interp.metric import Metric
from glasshouse.model import GPT, Taps
from glasshouse.model.attend import Rule, causal_mask
from glasshouse.model.gpt import Block
from glasshouse.model.taps import Edit

SEQUENCES = 64  # in one forward pass, unless told otherwise: enough to fill two cores on small models


@dataclass(frozen=True)
class Base:
    """A run to make changes in: the residual stream before every layer, [n, pos, d_model] each."""

    tokens: Tensor
    rows: Tensor
    values: Tensor  # the metric [n] of the unchanged run
    before: tuple[Tensor, ...]
    first_v: Tensor | None  # the first layer's values, which later layers mix in


def block(model: GPT, layer: int) -> Block:
    """A layer's block, with its type."""
    return cast(Block, model.blocks[layer])


def rule_of(model: GPT, layer: int) -> Rule:
    """How a layer makes its attention scores."""
    return block(model, layer).attn.rule


def check_rows(model: GPT, tokens: Tensor) -> Tensor:
    """``tokens`` int64 [n, pos] on the model's device; UsageError for another shape, no row, or too many
    positions or token ids that the model does not have.
    """
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point():
        raise UsageError(f"rows must be token ids [n, pos] with n and pos > 0; got {list(tokens.shape)}")
    if tokens.shape[1] > model.config.context:
        raise UsageError(
            f"rows of {tokens.shape[1]} tokens are longer than the model's context of "
            f"{model.config.context}; cut them"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.vocab_size:
        raise UsageError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}; the model has 0 to "
            f"{model.config.vocab_size - 1}: was this tokenized for another model?"
        )
    return tokens.to(model.device)


@torch.no_grad()
def read(model: GPT, tokens: Tensor, sites: Sequence[str], layer: int | None = None) -> dict[str, Tensor]:
    """The activations of ``sites``, by name, [n, ...]; the run stops once all were seen."""
    with Taps(read=set(sites), stop_early=True) as taps:
        model.hidden(tokens, taps)
    return {site: taps[site] for site in sites}


@torch.no_grad()
def base_run(model: GPT, tokens: Tensor, metric: Metric, rows: Tensor) -> Base:
    """Run ``tokens`` [n, pos], the data set's ``rows`` [n], and keep what changed runs begin with."""
    before = [f"blocks.{i}.resid_pre" for i in range(model.config.n_layer)]
    mixed = ["blocks.0.v"] if model.config.value_residual else []
    with Taps(read=before + mixed) as taps:
        values = metric(model(tokens, taps), rows)
    first_v = taps["blocks.0.v"] if mixed else None
    return Base(tokens, rows, values, tuple(taps[site] for site in before), first_v)


def resume(model: GPT, x: Tensor, layer: int, taps: Taps, first_v: Tensor | None = None) -> Tensor:
    """Logits [batch, pos, vocab] from the residual stream ``x`` [batch, pos, d_model] before ``layer``.

    The same as `GPT.forward` from there on; ``first_v`` [batch, head, pos, d_head] as layer 0 made it.
    """
    taps.check(model.sites())
    full, local = model.where(x.shape[1])
    if first_v is not None and layer > 0:
        (local if model.config.windowed(0) else full).first_v = first_v
    x = taps("embed", x) if layer == 0 else x
    for i in range(layer, model.config.n_layer):
        x = model.run_block(block(model, i), x, local if model.config.windowed(i) else full, taps, None)
    return model.unembed(taps("final_norm", model.norm(x)))


@torch.no_grad()
def changed(
    model: GPT,
    base: Base,
    metric: Metric,
    places: Sequence[Place],
    source: Mapping[str, Tensor],
    sequences: int = SEQUENCES,
) -> Tensor:
    """The metric [place, n] when each place in turn gets what ``source`` ([n, ...] by site) has there.

    Everything after it is computed anew; nothing else is changed. Places of one layer share forward passes.
    """
    n, last = len(base.tokens), model.config.n_layer - 1
    per_pass = max(1, sequences // n)
    found = torch.empty(len(places), n, device=base.values.device, dtype=base.values.dtype)
    order = sorted(range(len(places)), key=lambda i: places[i].layer)
    for layer, members in groupby(order, key=lambda i: min(max(places[i].layer, 0), last)):
        for some in cut(list(members), per_pass):
            k = len(some)
            edits = put_edits(in_turn([places[i] for i in some], n), source)
            first = None if base.first_v is None else times(base.first_v, k)
            with Taps(edit=edits) as taps:
                logits = resume(model, times(base.before[layer], k), layer, taps, first)
            found[some] = metric(logits, base.rows.repeat(k)).view(k, n)
    return found


def times(x: Tensor, k: int) -> Tensor:
    """``x`` [n, ...] as [k * n, ...]: all rows, then all rows again."""
    return x.repeat(k, *(1 for _ in x.shape[1:]))


def cut(items: list[int], size: int) -> Iterator[list[int]]:
    """Runs of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def in_turn(places: Sequence[Place], n: int) -> list[tuple[slice, Place]]:
    """Changes for a batch in which rows i*n to (i+1)*n are changed at place i."""
    return [(slice(i * n, (i + 1) * n), place) for i, place in enumerate(places)]


def put_edits(changes: Sequence[tuple[slice, Place]], source: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Edits that put ``source`` [n, ...], by site, into n rows of a batch at each place."""
    at: dict[str, list[tuple[slice, Place]]] = {}
    for rows, place in changes:
        at.setdefault(place.site, []).append((rows, place))

    def edit(site: str) -> Edit:
        def put(x: Tensor) -> Tensor:
            x = x.clone()
            for rows, place in at[site]:
                place.put(x, rows, source[site])
            return x

        return put

    return {site: edit(site) for site in at}


def row_chunks(n: int, sequences: int) -> Iterator[Tensor]:
    """Row numbers in runs of at most ``sequences``."""
    yield from torch.arange(n).split(max(1, sequences))


def seen_by(model: GPT, layer: int, T: int) -> Tensor:
    """bool [T, T]: which key (column) a query (row) of ``layer`` sees."""
    full, local = model.where(T)
    mask = (local if model.config.windowed(layer) else full).mask
    if mask is not None:
        return mask
    if not rule_of(model, layer).causal:
        return torch.ones(T, T, dtype=torch.bool, device=model.device)
    return causal_mask(T, T, model.device)
