"""Keys and values of positions already computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glasshouse.model.gpt import GPTConfig


def no_roles(config: GPTConfig, rows: int, size: int, device: torch.device) -> Tensor | None:
    """Room for the role of every cached token, int64 [rows, size]; None for a model that reads no roles.

    Kept for every position, like keys: a cache cut back to fewer of them then still knows who speaks there.
    """
    return None if config.roles is None else torch.zeros((rows, size), dtype=torch.long, device=device)


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
        self.roles = no_roles(config, batch, size, device)

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
        self.roles = None if self.roles is None else self.roles[rows]

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
        new.roles = None if self.roles is None else self.roles.new_zeros((batch, size))
        if new.roles is not None and self.roles is not None:
            new.roles[:, : self.length] = self.roles[:, : self.length]
        return new


class SlotCache:
    """A static key/value cache for decoding whose rows have lengths of their own.

    Row b's position p stands in slot p, so that a row looks the same whoever its batch mates are; slots
    at or beyond ``lengths[b]`` hold leftovers that a mask hides. k, v: [layer][rows, n_kv_head, size,
    d_head]; ``size`` is rounded up to whole spans, for reads in whole spans (see ``Decoder``).
    """

    SPAN = 64

    def __init__(self, config: GPTConfig, rows: int, size: int, dtype: torch.dtype, device: torch.device):
        self.size = max(2, -(-size // self.SPAN)) * self.SPAN
        shape = (rows, config.kv_heads, self.size, config.head_width)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.lengths = [0] * rows
        self.roles = no_roles(config, rows, self.size, device)

    @property
    def rows(self) -> int:
        """How many sequences it holds."""
        return len(self.lengths)

    def read(self, layer: int, rows: int, filled: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``rows`` rows, all slots below ``filled`` and up to a whole span.

        At least two spans: one is short enough that kernels of their own, with other rounding, would serve.
        """
        end = max(2, -(-filled // self.SPAN)) * self.SPAN
        return self.k[layer][:rows, :, :end], self.v[layer][:rows, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order: finished sequences leave the batch."""
        at = torch.tensor(rows, device=self.k[0].device)
        self.k = [x[at] for x in self.k]
        self.v = [x[at] for x in self.v]
        self.roles = None if self.roles is None else self.roles[at]
        self.lengths = [self.lengths[i] for i in rows]

    def put_prefix(self, prefix: SlotCache, length: int) -> None:
        """Begin every row with the first ``length`` positions of a cache of one row."""
        if prefix.rows != 1:
            raise ValueError(f"only a cache of one row can be a prefix, not one of {prefix.rows}")
        if not 0 <= length <= min(self.size, prefix.lengths[0]):
            raise ValueError(f"a prefix of {length} positions, but {prefix.lengths[0]} are filled")
        for mine, theirs in ((self.k, prefix.k), (self.v, prefix.v)):
            for x, y in zip(mine, theirs, strict=True):
                x[:, :, :length] = y[:, :, :length]
        if self.roles is not None and prefix.roles is not None:
            self.roles[:, :length] = prefix.roles[:, :length]
        self.lengths = [length] * self.rows
