"""Gradient routing (Cloud et al. 2024, arXiv 2410.04332): rows of marked shards update only a block of the
model, which can then be removed.

A block is some heads and MLP units of some layers, with the weights that lead into them and out of them:
rows of ``q``, ``k``, ``v``, ``up``, ``gate`` (and their biases), columns of ``o`` and ``down``. Removed is a
block whose columns of ``o`` and ``down`` are zero: nothing that it computes reaches the stream.

The paper masks gradients where they flow; here the two kinds of rows have backward passes of their own and
the mask is laid on the parameters' gradients, so that "only the block" holds exactly, for embeddings and
norms too. Muon orthogonalises a routed matrix's block and the rest apart (`Muon.apart`), for its product
would let the one shape the other's update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.model import GPT, GPTConfig
from glasshouse.train.interventions import Edit, Edited, marked_rows
from glasshouse.train.interventions_config import Block, Route
from glasshouse.train.objective import Loss, Objective, TensorBatch
from glasshouse.train.step import backward

Masks = dict[str, Tensor]


def part_of(config: GPTConfig, share: float, *, heads: bool = False) -> tuple[Block, ...]:
    """The last ``share`` of every layer's MLP units, at least one, and with ``heads`` its last head."""
    units = max(1, round(share * config.mlp_width))
    last = (config.n_head - 1,) if heads else ()
    return tuple(
        Block(layer=layer, heads=last, units=(config.mlp_width - units, config.mlp_width))
        for layer in range(config.n_layer)
    )


def check_blocks(config: GPTConfig, blocks: Sequence[Block]) -> None:
    """UsageError for a layer, head or unit that the model lacks."""
    for block in blocks:
        if block.layer >= config.n_layer:
            raise UsageError(f"a routed block is in layer {block.layer}; the model has {config.n_layer}")
        if any(not 0 <= head < config.n_head for head in block.heads):
            raise UsageError(f"a routed block names heads {list(block.heads)} of {config.n_head}")
        if block.heads and config.kv_heads != config.n_head:
            raise UsageError(
                "heads that share keys and values cannot be routed apart; name MLP units instead"
            )
        if block.heads and config.qk_norm and config.qk_norm_span != "head":
            raise UsageError("heads whose queries are normed together cannot be routed apart; name MLP units")
        if block.units is not None and block.units[1] > config.mlp_width:
            raise UsageError(f"a routed block names units to {block.units[1]} of {config.mlp_width}")


def block_masks(model: GPT, blocks: Sequence[Block], *, outgoing: bool = False) -> Masks:
    """Parameter name -> bool mask of the entries that belong to ``blocks``; ``outgoing``: only those that
    lead out of them. UsageError as `check_blocks`.
    """
    check_blocks(model.config, blocks)
    width, named = model.config.head_width, dict(model.named_parameters())
    masks: Masks = {}

    def mark(name: str, at: Any) -> None:
        if name in named:
            mask = masks.setdefault(name, torch.zeros(named[name].shape, dtype=torch.bool))
            mask[at] = True

    for block in blocks:
        prefix = f"blocks.{block.layer}."
        spans = [(prefix + "attn.", slice(h * width, (h + 1) * width)) for h in block.heads]
        for attention, span in spans:
            mark(attention + "o.weight", (slice(None), span))
            for name in () if outgoing else ("q", "k", "v"):
                mark(attention + name + ".weight", span)
                mark(attention + name + ".bias", span)
        if block.units is not None:
            span = slice(*block.units)
            mark(prefix + "mlp.down.weight", (slice(None), span))
            for name in () if outgoing else ("up", "gate"):
                mark(prefix + "mlp." + name + ".weight", span)
                mark(prefix + "mlp." + name + ".bias", span)
    return masks


@torch.no_grad()
def remove_blocks(model: GPT, blocks: Sequence[Block]) -> GPT:
    """``model`` in place without what ``blocks`` write to the stream; returned."""
    named = dict(model.named_parameters())
    for name, mask in block_masks(model, blocks, outgoing=True).items():
        named[name].masked_fill_(mask.to(named[name].device), 0.0)
    return model


@contextlib.contextmanager
def without_blocks(model: GPT, blocks: Sequence[Block]) -> Iterator[None]:
    """Within, ``model`` is without ``blocks``; afterwards it has the bits that it had."""
    named = dict(model.named_parameters())
    names = block_masks(model, blocks, outgoing=True) if blocks else {}
    kept = {name: named[name].detach().clone() for name in names}
    if blocks:
        remove_blocks(model, blocks)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                named[name].copy_(value)


def silenced(blocks: Sequence[Block]) -> dict[str, Edit]:
    """Edits under which a forward pass runs as if ``blocks`` were removed."""
    edits: dict[str, Edit] = {}
    for block in blocks:
        if block.heads:
            edits[f"blocks.{block.layer}.z"] = _without(list(block.heads), 1)
        if block.units is not None:
            edits[f"blocks.{block.layer}.mlp_post"] = _without(list(range(*block.units)), -1)
    return edits


def _without(at: list[int], dim: int) -> Edit:
    return lambda x: x.index_fill(dim, torch.tensor(at, device=x.device), 0.0)


def route_of(declared: Sequence[Any], model: Any) -> Route | None:
    """The routes among ``declared`` as one: rows of all their shards go to all their blocks. None if there is
    none; UsageError when they contradict each other or do not fit ``model``.
    """
    routes = [one for one in declared if isinstance(one, Route)]
    if not routes:
        return None
    if not isinstance(model, GPT):
        raise UsageError("gradient routing needs a GPT: its blocks are heads and MLP units")
    if len({route.absorb for route in routes}) > 1:
        raise UsageError("of two routes in force one absorbs and the other does not: make them alike")
    blocks = tuple(dict.fromkeys(block for route in routes for block in route.blocks))
    check_blocks(model.config, blocks)
    shards = tuple(sorted({shard for route in routes for shard in route.shards}))
    return Route(kind="route", shards=shards, blocks=blocks, absorb=routes[0].absorb)


def routed_backward(
    model: GPT, objective: Objective, batch: TensorBatch, dtype: str, accumulate: int, route: Route
) -> Loss:
    """`backward`, where marked rows give gradients to the blocks alone and, unless the route absorbs, the
    others run without the blocks. Gradients are those of the mean over the whole batch.
    """
    marked = marked_rows(batch, route.shards)
    masks = block_masks(model, route.blocks)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole, found = float(batch.weight.sum()), list[tuple[Loss, float]]()
    sums: dict[str, Tensor] = {}
    for is_marked in (False, True):
        rows = [int(i) for i in (marked == is_marked).nonzero().flatten()]
        part = batch.take(rows)
        share = float(part.weight.sum()) / whole if whole else 0.0
        if share == 0.0:
            continue
        for p in named.values():
            p.grad = None
        pieces = accumulate if len(rows) % accumulate == 0 else 1
        runs = _silent(objective, route.blocks) if not (is_marked or route.absorb) else objective
        loss = backward(model, runs, part, dtype, pieces)
        found.append((loss, share))
        for name, p in named.items():
            if p.grad is None or (is_marked and name not in masks):
                continue
            grad = p.grad * share
            if is_marked:
                grad = grad * masks[name].to(grad.device)
            elif not route.absorb and name in masks:
                grad = grad * ~masks[name].to(grad.device)
            sums[name] = sums[name] + grad if name in sums else grad
    for name, p in named.items():
        p.grad = sums.get(name)
    return _together(found, batch)


def _silent(objective: Objective, blocks: Sequence[Block]) -> Objective:
    return lambda model, batch: objective(Edited(model, silenced(blocks)), batch)


def _together(found: Sequence[tuple[Loss, float]], batch: TensorBatch) -> Loss:
    """The loss over the whole batch, from those of its parts and their shares of the weight."""
    if not found:
        raise UsageError(f"a batch from {', '.join(batch.shards)} has no target to learn from")
    total = torch.stack([loss.total.detach() * share for loss, share in found]).sum()
    parts: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for loss, share in found:
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, torch.zeros_like(total)) + value.detach() * share
        for key, number in loss.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + number
    if "n_bytes" in metrics:
        metrics["n_bytes"] = float(batch.n_bytes)
    return Loss(total, parts, metrics)


def apart_in(model: GPT, blocks: Sequence[Block]) -> dict[nn.Parameter, Tensor]:
    """For Muon: parameter -> mask of what is orthogonalised apart from the rest."""
    named, masks = dict(model.named_parameters()), block_masks(model, blocks)
    return {named[name]: mask.to(named[name].device) for name, mask in masks.items() if mask.ndim == 2}
