"""What the loader hands to the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from glasshouse.base.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """One training step's worth of tokens, as numpy arrays; the trainer moves them to its device.

    `targets[b, p]` is the token that should follow `tokens[b, : p + 1]`; `weight` is 0 where the loss
    does not count (padding, text that the assistant did not write). `shards` names every shard that
    the batch drew from. `n_bytes` is the number of UTF-8 bytes that the targets with weight > 0 stand for.
    `rows` names the shard of every row, where the source knows it.
    Raises `DataError` if shapes differ, the batch is empty, or a dtype is not the one named here.
    """

    tokens: Int64[np.ndarray, "batch pos"]
    targets: Int64[np.ndarray, "batch pos"]
    weight: Float32[np.ndarray, "batch pos"]
    shards: tuple[str, ...]
    n_bytes: int
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.size == 0:
            raise DataError(f"a batch needs tokens of shape [batch, pos], got {self.tokens.shape}")
        for name, dtype in (("tokens", np.int64), ("targets", np.int64), ("weight", np.float32)):
            array = getattr(self, name)
            if array.shape != self.tokens.shape or array.dtype != dtype:
                raise DataError(
                    f"batch.{name} must be {np.dtype(dtype)} of shape {self.tokens.shape}, "
                    f"got {array.dtype} of shape {array.shape}"
                )
        if self.rows and len(self.rows) != len(self.tokens):
            raise DataError(f"a batch of {len(self.tokens)} rows names the shards of {len(self.rows)}")
