"""Exact patching: the effect of every edge alone, each by a forward pass of its own (Conmy et al. 2023).

The reference that every faster method is compared with. One edge changes one input of one node, so a pass
begins there: what stands before it is the clean run's, and for the three inputs of all heads of a layer the
projections are computed once for each *writer*, because every reader of the layer would see the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.circuits.split import Split
from glasshouse.model.cache import KVCache
from glasshouse.model.gpt import Block, Where

TOKENS_AT_ONCE = 8192  # rows * positions of one downstream pass: larger ones leave the processor's caches


class _Prefix(KVCache):
    """The clean run's keys and values of earlier positions, seen by every set of rows alike."""

    def __init__(self, clean: KVCache):
        self.k, self.v, self.size, self.length = clean.k, clean.v, clean.size, clean.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sets, n = len(k) // len(self.k[layer]), len(self.k[layer])

        def after(before: Tensor, new: Tensor) -> Tensor:
            whole = new.new_empty(*new.shape[:2], self.length + new.shape[2], new.shape[3])
            whole.view(sets, n, *whole.shape[1:])[..., : self.length, :] = before[:, :, : self.length]
            whole[:, :, self.length :] = new
            return whole

        return after(self.k[layer], k), after(self.v[layer], v)


@torch.no_grad()
def edge_effects(patcher: Patcher) -> Tensor:
    """The metric [edge, n] with each edge alone cut, in `Graph.edges` order."""
    out = torch.empty(len(patcher.graph.edges), len(patcher))
    at = 0
    for streams, stage in _cut_streams(patcher):  # [edges, n, T, D], in the order of the graph's edges
        size = max(1, TOKENS_AT_ONCE // (streams.shape[1] * streams.shape[2]))
        for part in streams.split(size):
            out[at : at + len(part)] = _downstream(patcher, part, stage).float().cpu()
            at += len(part)
    assert at == len(out), f"{at} edges of {len(out)}"
    return out


def _cut_streams(patcher: Patcher) -> Iterator[tuple[Tensor, int]]:
    """For every reader in order: the stream [writers, n, T, D] after its node, with each of its edges cut;
    and the layer that comes next.
    """
    split, graph, config = patcher.split, patcher.graph, patcher.model.config
    full, local = patcher.model.where(patcher.length, patcher.past)
    change = patcher.alternative - patcher.live
    x = patcher.live[: graph.first].sum(0) + patcher.rests[0]  # [n, T, D]
    for layer in range(config.n_layer):
        block = split.block(layer)
        seen = graph.written_before(layer)
        heads, mid = _clean_heads(patcher, block, x, local if block.windowed else full)
        made = split.mlp(block, x if block.parallel else mid)
        for cut in _cut_heads(patcher, block, x, change[:seen], heads, local if block.windowed else full):
            yield cut + (made if block.parallel else split.mlp(block, cut)), layer + 1
        read = (x if block.parallel else mid) + change[: graph.written_before(layer, mlp=True)]
        yield mid + split.mlp(block, read), layer + 1
        x = mid + made
    yield x + change, config.n_layer


Heads = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor
]  # q, k, v, z: [H, n, T, K]; sum before any norm [n, T, D]


def _clean_heads(patcher: Patcher, block: Block, x: Tensor, where: Where) -> tuple[Heads, Tensor]:
    """The clean run's heads, and the stream after them."""
    q, k, v = patcher.split.whole_qkv(block, x)
    z = patcher.split.mix(block.attn, q, k, v, where, patcher.prefix)
    total = block.attn.o(z.permute(1, 2, 0, 3).flatten(2))
    return (q, k, v, z, total), x + block.post1(total)


def _cut_heads(
    patcher: Patcher, block: Block, x: Tensor, change: Tensor, heads: Heads, where: Where
) -> Iterator[Tensor]:
    """The stream after attention [writers, n, T, D] with each edge cut: for <q>, <k>, <v>, head by head."""
    split: Split = patcher.split
    *clean, z, total = heads
    W, n = change.shape[:2]
    new = split.whole_qkv(block, (x + change).flatten(0, 1))  # each [H, W n, T, K]
    H, K = len(z), z.shape[-1]
    out = block.attn.o.weight.view(-1, H, K)
    for part in range(3):
        mixed = [new[i] if i == part else c.repeat(1, W, 1, 1) for i, c in enumerate(clean)]
        moved = split.mix(block.attn, mixed[0], mixed[1], mixed[2], where, patcher.prefix)
        for h in range(H):
            moves = (moved[h].unflatten(0, (W, n)) - z[h]) @ out[:, h].T  # [W, n, T, D]
            yield x + block.post1(total + moves)


def _downstream(patcher: Patcher, streams: Tensor, layer: int) -> Tensor:
    """The metric [edges, n] of streams [edges, n, T, D] before ``layer``."""
    model, sets = patcher.model, len(streams)
    full, local = model.where(patcher.length, patcher.past)
    cache = _Prefix(patcher.prefix) if patcher.prefix is not None else None
    x = streams.flatten(0, 1)
    for block in list(model.blocks)[layer:]:
        run: Callable[..., Tensor] = block
        x = run(x, local if block.windowed else full, None, cache)
    rows = patcher.rows_of(sets)
    return patcher.contrast.metric(patcher.unembed(model.norm(x), rows), rows).view(sets, -1)
