"""Keys and values of positions already computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glasshouse.model.gpt import GPTConfig


class KVCache:
    """A fixed-size key/value cache, each [layer][batch, n_kv_head, size, d_head].

    ``length`` counts the positions filled; the model raises it once per forward pass, after the last
    layer has written. ``expand`` shares a prefix: one prompt computed once, continued many ways.
    """

    def __init__(self, config: GPTConfig, batch: int, size: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.kv_heads, size, config.head_width)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.size, self.length = size, 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, n_kv_head, new, d_head]; return all filled so far."""
        if k.shape[0] != self.k[layer].shape[0]:  # assignment would broadcast one row over all
            raise ValueError(f"cache of {self.k[layer].shape[0]} rows given {k.shape[0]}")
        end = self.length + k.shape[2]
        if end > self.size:
            raise ValueError(f"cache of {self.size} positions cannot hold {end}")
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (int64 [kept]), in this order: finished sequences leave the batch."""
        self.k = [x[rows] for x in self.k]
        self.v = [x[rows] for x in self.v]

    def expand(self, batch: int, size: int) -> KVCache:
        """A new cache of ``batch`` rows and ``size`` positions whose prefix repeats this one's single row."""
        if size < self.length:
            raise ValueError(f"{size} positions cannot hold a prefix of {self.length}")
        new = object.__new__(KVCache)
        new.size, new.length = size, self.length
        new.k, new.v = [], []
        for mine, theirs in ((self.k, new.k), (self.v, new.v)):
            for x in mine:
                if x.shape[0] != 1:
                    raise ValueError(f"only a cache of one row can be expanded, not {x.shape[0]}")
                full = x.new_zeros((batch, x.shape[1], size, x.shape[3]))
                full[:, :, : self.length] = x[:, :, : self.length]
                theirs.append(full)
        return new
