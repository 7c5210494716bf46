"""The order in which stored vectors are drawn: a pure function of (seed, step), in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator

# Vectors mixed with one another at a time; their numbers take 8 MB, and only their pages need be in memory.
POOL = 2**20


class Shuffle:
    """``order(step)``: the numbers int64 [batch] of the vectors in a step's batch.

    An epoch visits every vector once: shards in random order, joined into pools of at least ``pool`` vectors
    (all of them if there are fewer), each pool permuted. Epochs follow each other without a gap, so a batch
    may reach over the end of one. Memory is bounded by the largest pool. UsageError without vectors, or for
    a ``batch`` or ``pool`` below 1.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int = 0, *, pool: int = POOL):
        if batch < 1 or pool < 1 or not sizes or min(sizes) < 1:
            raise UsageError(
                f"shuffling needs vectors, and batch and pool of at least 1; got {batch}, {pool}"
            )
        self.batch, self.seed, self.pool = batch, seed, pool
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.n = int(self.starts[-1])
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None
        self._pool: tuple[int, int, np.ndarray] | None = None

    def __call__(self, step: int) -> np.ndarray:
        if step < 0:
            raise UsageError(f"steps count from 0, not {step}")
        return self.between(step * self.batch, (step + 1) * self.batch)

    def between(self, start: int, end: int) -> np.ndarray:
        """Numbers ``start`` to ``end`` of the endless sequence of epochs, int64 [end - start]."""
        parts = []
        while start < end:
            epoch, at = divmod(start, self.n)
            _, bounds = self._pools(epoch)
            p = int(np.searchsorted(bounds, at, side="right")) - 1
            take = min(end - start, int(bounds[p + 1]) - at)
            parts.append(self._permuted(epoch, p)[at - bounds[p] : at - bounds[p] + take])
            start += take
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _pools(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each pool of an epoch, and where each pool starts in it (and the last ends)."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = generator("activations", self.seed, epoch).permutation(len(self.sizes))
            before = np.cumsum(self.sizes[order]) - self.sizes[order]
            groups, begin = [], 0
            for i in range(1, len(order) + 1):
                full = i < len(order) and before[i] - before[begin] >= self.pool
                if full or i == len(order):
                    groups.append(order[begin:i])
                    begin = i
            bounds = np.cumsum([0, *(int(self.sizes[group].sum()) for group in groups)])
            self._epoch = (epoch, groups, bounds)
        return self._epoch[1], self._epoch[2]

    def _permuted(self, epoch: int, p: int) -> np.ndarray:
        if self._pool is None or self._pool[:2] != (epoch, p):
            shards = self._pools(epoch)[0][p]
            numbers = np.concatenate([np.arange(self.starts[k], self.starts[k + 1]) for k in shards])
            generator("activations", self.seed, epoch, p).shuffle(numbers)
            self._pool = (epoch, p, numbers)
        return self._pool[2]
