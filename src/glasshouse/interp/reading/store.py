"""Activation stores: vectors of chosen sites with the tokens they stand on, on disk, read without loading.

    store/index.json          sites, widths, dtype, model digest, source; each shard's size, mark and digests
    store/000000.<site>.bin   [n, width] little-endian float32, float16, or bfloat16 as uint16 bit patterns
    store/000000.tokens.bin   int32 [n]: the token at which each vector was taken
    store/000000.positions.bin  int32 [n]: its position in its row
    store/000000.rows.bin     int64 [n]: the number of its row or document

A shard exists once the index names it, and the index is replaced atomically after the shard's files are on
disk: a process killed anywhere leaves a shorter store, never a broken one (`writer` resumes it).
Sites with heads are stored with heads side by side: [batch, head, pos, d_head] -> [n, head * d_head].
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.draw import table
from glasshouse.interp.reading.shuffle import POOL, Shuffle
from glasshouse.model.digest import weights_digest

INDEX = "index.json"
STORED: dict[str, np.dtype[Any]] = {
    **{"float32": np.dtype("<f4"), "float16": np.dtype("<f2")},
    "bfloat16": np.dtype("<u2"),
}
LABELS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "positions": np.dtype("<i4"),
    "rows": np.dtype("<i8"),
}
SITE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")
DIGEST = re.compile(r"[0-9a-f]{64}")
OPEN_MAPS = 256  # shard files mapped at once


@dataclass(frozen=True)
class Shard:
    """``n`` vectors per site; the last is number ``count`` (from 1) of those appended under ``mark``."""

    n: int
    mark: int
    count: int
    files: dict[str, str]


@dataclass(frozen=True)
class Index:
    """What ``index.json`` holds. ``widths``: site -> width, in the order given when the store was begun."""

    widths: dict[str, int]
    dtype: str
    model: str
    source: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def dtype_of(self, column: str) -> np.dtype[Any]:
        """How a column (a site, or one of tokens, positions, rows) stands in its files."""
        return LABELS[column] if column in LABELS else STORED[self.dtype]

    def columns(self) -> list[str]:
        """Every file of a shard, by the middle of its name."""
        return [*self.widths, *LABELS]

    def save(self, folder: Path) -> None:
        """Replace the folder's index atomically."""
        shards = [vars(shard) for shard in self.shards]
        widths = list(self.widths.items())  # a list: JSON's sorted keys would lose the order
        write_json(folder / INDEX, {**vars(self), "version": 1, "widths": widths, "shards": shards})

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read and check an index. UsageError if there is none, DataError if it is not one."""
        path = folder / INDEX
        if not path.is_file():
            raise UsageError(f"{path}: no such file; is {folder} an activation store?")
        try:
            raw = json.loads(path.read_text("utf-8"))
            if raw.pop("version") != 1:
                raise ValueError("an unknown version")
            shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
            index = cls(**{**raw, "widths": dict(raw["widths"]), "shards": shards})
            _check(index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not an activation index ({error}); fill the store again") from error
        return index


def file_name(shard: int, column: str) -> str:
    """The file of one column of one shard."""
    return f"{shard:06d}.{column}.bin"


def check_sites(sites: list[str]) -> None:
    """UsageError for a site that cannot name a file, or that is named twice."""
    for site in sites:
        if not SITE.fullmatch(site) or site in LABELS:
            raise UsageError(f"the site {site!r} cannot name a file of a store")
    if not sites or len(set(sites)) < len(sites):
        raise UsageError(f"a store needs sites, each once; got {sites}")


class ActivationStore:
    """An activation store opened for reading; ``len(store)`` vectors at each of ``store.sites``.

    Files are memory-mapped: a store may be larger than memory. With ``verify`` every file's SHA-256 is
    compared; sizes always are. Raises UsageError where there is no store, DataError naming a file that is
    missing, truncated or changed, and for a store without a vector. With ``model`` given, the store must have
    been filled from it.
    """

    def __init__(self, folder: str | Path, *, model: nn.Module | None = None, verify: bool = False):
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        if not self.index.shards:
            raise DataError(f"{self.folder}: the activation store is empty; fill it first")
        self.starts = np.cumsum([0, *(shard.n for shard in self.index.shards)])
        self._maps: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._check_files(verify)
        if model is not None:
            self.check_model(model)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}: {len(self):,} vectors at {len(self.sites)} sites)"

    def _repr_html_(self) -> str:
        rows = [(site, width, f"{len(self):,}", self.dtype) for site, width in self.widths.items()]
        caption = f"Activations of model {self.model_digest[:12] or '(in training)'}"
        return str(table(("site", "width", "vectors", "dtype"), rows, caption))

    @property
    def sites(self) -> list[str]:
        """The sites stored."""
        return list(self.index.widths)

    @property
    def widths(self) -> dict[str, int]:
        """Site -> width of its vectors."""
        return self.index.widths

    @property
    def dtype(self) -> str:
        """float32, float16 or bfloat16, as stored; reading gives float32."""
        return self.index.dtype

    @property
    def model_digest(self) -> str:
        """`weights_digest` of the model that was read, or "" if it was training meanwhile."""
        return self.index.model

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the index, which holds the digest of every file."""
        return sha256_file(self.folder / INDEX)

    def check_model(self, model: nn.Module) -> None:
        """UsageError unless the store holds activations of exactly these weights."""
        found = weights_digest(model)
        if found != self.model_digest:
            of = f"model {self.model_digest[:12]}..." if self.model_digest else "a model while it trained"
            raise UsageError(f"{self.folder} holds activations of {of}, not of this one ({found[:12]}...)")

    def read(self, site: str, index: np.ndarray | Tensor | None = None) -> Tensor:
        """Vectors [n, width], float32, of ``site`` at ``index`` int64 [n] (None: all of them).

        UsageError for a site that is not stored or a number out of range.
        """
        if site not in self.widths:
            raise UsageError(
                f"no site {site!r} in {self.folder}.{suggest(site, self.sites)} It has {self.sites}"
            )
        got = self._gather(site, index, (self.widths[site],))
        if self.dtype == "bfloat16":
            return torch.from_numpy(got.view(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(got).float()

    def tokens(self, index: np.ndarray | Tensor | None = None) -> Tensor:
        """The token of each vector, int64 [n]."""
        return torch.from_numpy(self._gather("tokens", index, ()).astype(np.int64))

    def positions(self, index: np.ndarray | Tensor | None = None) -> Tensor:
        """The position of each vector in its row, int64 [n]."""
        return torch.from_numpy(self._gather("positions", index, ()).astype(np.int64))

    def rows(self, index: np.ndarray | Tensor | None = None) -> Tensor:
        """The number of each vector's row or document, int64 [n]."""
        return torch.from_numpy(self._gather("rows", index, ()).astype(np.int64))

    def shuffle(self, batch: int = 4096, seed: int = 0, *, pool: int = POOL) -> Shuffle:
        """The order of `stream`: which vectors make which step's batch."""
        return Shuffle([shard.n for shard in self.index.shards], batch, seed, pool=pool)

    def stream(
        self, site: str, batch: int = 4096, seed: int = 0, *, start: int = 0, pool: int = POOL
    ) -> Iterator[Tensor]:
        """Yield shuffled batches [batch, width] of ``site`` without end, from step ``start`` on.

        The batch of a step is a pure function of (seed, step). For two sites at the same vectors, use
        `shuffle` and `read`.
        """
        order, step = self.shuffle(batch, seed, pool=pool), start
        while True:
            yield self.read(site, order(step))
            step += 1

    def _gather(self, column: str, index: np.ndarray | Tensor | None, tail: tuple[int, ...]) -> np.ndarray:
        at = np.arange(len(self)) if index is None else np.asarray(index, dtype=np.int64)
        if at.ndim != 1 or (at.size and not 0 <= at.min() <= at.max() < len(self)):
            raise UsageError(f"{self.folder} holds vectors 0 to {len(self) - 1}; the index [n] goes beyond")
        out = np.empty((len(at), *tail), self.index.dtype_of(column))
        of_shard = np.searchsorted(self.starts, at, side="right") - 1
        for k in np.unique(of_shard):
            mine = of_shard == k
            out[mine] = self._map(int(k), column, tail)[at[mine] - self.starts[k]]
        return out

    def _map(self, k: int, column: str, tail: tuple[int, ...]) -> np.ndarray:
        if (k, column) not in self._maps:
            path, shape = self.folder / file_name(k, column), (self.index.shards[k].n, *tail)
            self._maps[k, column] = np.memmap(path, self.index.dtype_of(column), mode="r", shape=shape)
        self._maps.move_to_end((k, column))
        if len(self._maps) > OPEN_MAPS:
            self._maps.popitem(last=False)
        return self._maps[k, column]

    def _check_files(self, verify: bool) -> None:
        for k, shard in enumerate(self.index.shards):
            for column in self.index.columns():
                path = self.folder / file_name(k, column)
                width = self.widths.get(column, 1)
                expected = shard.n * width * self.index.dtype_of(column).itemsize
                size = path.stat().st_size if path.is_file() else -1
                if size != expected:
                    what = "missing" if size < 0 else f"{size} bytes"
                    raise DataError(
                        f"{path}: {what}, expected {expected}; restore it or fill the store again"
                    )
                if verify and sha256_file(path) != shard.files[path.name]:
                    raise DataError(
                        f"{path}: changed since it was written; restore it or fill the store again"
                    )


def _check(index: Index) -> None:
    """Raise ValueError or UsageError where an index could not have been written by us."""
    if index.dtype not in STORED or type(index.complete) is not bool or not isinstance(index.source, dict):
        raise ValueError("unknown dtype, or 'complete' or 'source' of the wrong type")
    if index.model and not DIGEST.fullmatch(index.model):
        raise ValueError("'model' is no digest")
    if not all(
        SITE.fullmatch(site) and type(width) is int and width > 0 for site, width in index.widths.items()
    ):
        raise ValueError("sites or widths")
    for k, shard in enumerate(index.shards):
        # Only these names, or an index could point outside its folder.
        names = {file_name(k, column) for column in index.columns()}
        if type(shard.n) is not int or shard.n < 1 or set(shard.files) != names:
            raise ValueError(f"shard {k}")
        if type(shard.mark) is not int or type(shard.count) is not int:
            raise ValueError(f"mark of shard {k}")
