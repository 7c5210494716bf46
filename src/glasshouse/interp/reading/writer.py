"""Write an activation store: append while training or from a checkpoint, killed anywhere, resumed exactly.

Every append carries a mark (a batch number, a training step) that only grows, and every shard records the
mark and place of its last vector. What is appended again after a restart, up to there, is known to be stored
and left out: nothing is lost and nothing is stored twice, as long as a mark stands for the same vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.atomic import sweep_temporaries, write_bytes
from glasshouse.base.crash import crash_point
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.base.run import RunFolder
from glasshouse.interp.reading.store import (
    INDEX,
    LABELS,
    STORED,
    Index,
    Shard,
    check_sites,
    file_name,
)

SHARD = 65_536  # vectors of each site in a shard: 200 MB at width 768 in float32


class StoreWriter:
    """Begin or go on with a store of ``sites`` in ``folder``; one process at a time.

    ``shard``: vectors a shard. ``model``: digest of the weights that are read ("" while they train).
    ``source``: what the vectors come from, as JSON. A store begun with other sites, dtype, model or source
    is refused (UsageError), and so is one that another process fills (RunBusyError).

    As a context manager it flushes at the end, but not after an error: what was buffered is then appended
    again by whoever resumes.
    """

    def __init__(
        self,
        folder: str | Path,
        sites: Sequence[str],
        *,
        model: str = "",
        dtype: str = "float32",
        shard: int = SHARD,
        source: Mapping[str, Any] | None = None,
    ):
        self.folder, self.sites, self.shard = Path(folder), list(sites), shard
        check_sites(self.sites)
        if dtype not in STORED:
            raise UsageError(f"unknown dtype {dtype!r}; a store holds {', '.join(STORED)}")
        if shard < 1:
            raise UsageError(f"a shard holds at least 1 vector, not {shard}")
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(RunFolder(self.folder).lock())
        try:
            sweep_temporaries(self.folder)
            wanted = Index({}, dtype, model, dict(source or {}))
            self.index = _resumed(self.folder, self.sites, wanted)
        except BaseException:
            self._lock.close()
            raise
        last = self.index.shards[-1] if self.index.shards else None
        self._stored = (last.mark, last.count) if last else (-1, 0)
        self._at = (-1, 0)  # the mark being appended, and how many vectors came under it
        self._buffer: list[dict[str, np.ndarray]] = []
        self._buffered = 0

    def __len__(self) -> int:
        """Vectors of each site that are on disk or buffered."""
        return sum(shard.n for shard in self.index.shards) + self._buffered

    @property
    def mark(self) -> int:
        """The mark of the last vector on disk; -1 for an empty store. Smaller marks need no appending."""
        return self._stored[0]

    def append(
        self,
        acts: Mapping[str, Tensor],
        tokens: Tensor,
        rows: Tensor,
        *,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        mark: int | None = None,
    ) -> int:
        """Add the activations of a batch; returns how many vectors (of each site) were new.

        ``acts``: site -> [batch, pos, width] or [batch, head, pos, d_head]. ``tokens`` int64 [batch, pos].
        ``rows`` int64 [batch]: the number of each row or document. ``positions`` int64 [batch, pos] (None:
        0, 1, ...). ``keep`` bool [batch, pos]: what to store (None: all). ``mark``: see above (None: one more
        than the last). UsageError for missing sites, wrong shapes or widths, or a mark that goes back;
        DataError naming site, row and position where a value is NaN, infinite, or too large for the dtype.
        """
        if self.index.complete:
            raise UsageError(f"{self.folder} is complete; fill another folder")
        kept = torch.ones(tokens.shape, dtype=torch.bool) if keep is None else keep.cpu().bool()
        labels = _labels(tokens, rows, positions, kept)
        columns = {site: self._column(site, acts, kept) for site in self.sites}
        self._check_widths({site: column.shape[1] for site, column in columns.items()})
        stored = {site: self._stored_bits(site, column, labels) for site, column in columns.items()}
        n = len(labels["tokens"])
        number = self._numbered(n, mark)
        new = slice(number, n)
        chunk = {name: array[new] for name, array in (stored | labels).items()}
        order = np.arange(self._at[1] - n, self._at[1])[new] + 1
        chunk |= {"mark": np.full(n - number, self._at[0]), "count": order}
        if n > number:
            self._buffer.append(chunk)
            self._buffered += n - number
        while self._buffered >= self.shard:
            self._write(self.shard)
        return n - number

    def flush(self) -> None:
        """Put what is buffered on disk, as a shard that may be short. Call it with every checkpoint."""
        if self._buffered:
            self._write(self._buffered)

    def finish(self) -> None:
        """Flush and mark the store complete. DataError when nothing was stored."""
        self.flush()
        if not self.index.shards:
            raise DataError(f"{self.folder}: nothing was stored; the data had no vector to keep")
        self.index = replace(self.index, complete=True)
        self.index.save(self.folder)

    def close(self) -> None:
        """Let another process write. What was not flushed is forgotten."""
        self._buffer, self._buffered = [], 0
        self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _numbered(self, n: int, mark: int | None) -> int:
        """Enter ``mark`` and return how many of its next ``n`` vectors are on disk already."""
        at = max(self._at[0], self._stored[0]) + 1 if mark is None else mark
        if at < max(self._at[0], 0):
            raise UsageError(f"marks must not go back: {at} after {self._at[0]}; begin another store")
        before = self._at[1] if at == self._at[0] else 0
        self._at = (at, before + n)
        if at != self._stored[0]:
            return n if at < self._stored[0] else 0
        return min(max(self._stored[1] - before, 0), n)

    def _column(self, site: str, acts: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        """The kept vectors [n, width] of one site."""
        if site not in acts:
            raise UsageError(f"the activations lack site {site!r}.{suggest(site, acts)}")
        x = acts[site].detach().cpu()
        if x.ndim == 4 and not site.endswith("pattern"):  # [batch, head, pos, d_head]
            x = x.transpose(1, 2).flatten(2)
        if x.ndim != 3 or x.shape[:2] != kept.shape:
            raise UsageError(
                f"{site!r} has shape {list(acts[site].shape)}; a store needs one vector for each of the "
                f"tokens {list(kept.shape)}"
            )
        return x[kept]

    def _check_widths(self, widths: dict[str, int]) -> None:
        if not self.index.widths:
            self.index = replace(self.index, widths=widths)
        for site, width in widths.items():
            if width != self.index.widths[site]:
                raise UsageError(
                    f"{site!r} has width {width}, but {self.folder} holds {self.index.widths[site]}"
                )

    def _stored_bits(self, site: str, x: Tensor, labels: Mapping[str, np.ndarray]) -> np.ndarray:
        """``x`` [n, width] as it stands on disk; DataError where a value cannot."""
        cast = x.to(getattr(torch, self.index.dtype))
        if not bool(cast.isfinite().all()):
            i = int((~cast.isfinite().all(1)).nonzero()[0])
            where = f"{site!r} at row {labels['rows'][i]}, position {labels['positions'][i]}"
            if bool(x[i].isfinite().all()):
                raise DataError(f"{where} is too large for {self.index.dtype}; store bfloat16 or float32")
            what = "NaN" if bool(x[i].isnan().any()) else "infinite"
            raise DataError(
                f"{where} is {what}: the model or the input is broken there; nothing of it is stored"
            )
        bits = cast.contiguous().view(torch.int16) if self.index.dtype == "bfloat16" else cast
        return bits.numpy().view(STORED[self.index.dtype])

    def _write(self, n: int) -> None:
        """Write the first ``n`` buffered vectors as the next shard: its files, then the index."""
        k = len(self.index.shards)
        whole = {name: np.concatenate([chunk[name] for chunk in self._buffer]) for name in self._buffer[0]}
        files = {}
        for column in self.index.columns():
            name, raw = file_name(k, column), whole[column][:n].tobytes()
            write_bytes(self.folder / name, raw)
            files[name] = sha256_bytes(raw)
        crash_point("activation-shard")
        shard = Shard(n, int(whole["mark"][n - 1]), int(whole["count"][n - 1]), files)
        index = replace(self.index, shards=(*self.index.shards, shard))
        index.save(self.folder)
        self.index, self._stored = index, (shard.mark, shard.count)
        self._buffered -= n
        self._buffer = [{name: array[n:] for name, array in whole.items()}] if self._buffered else []
        crash_point("activation-index")


def _resumed(folder: Path, sites: list[str], wanted: Index) -> Index:
    """The folder's index, or ``wanted``; UsageError when the folder's store was begun differently."""
    if not (folder / INDEX).is_file():
        return wanted
    found = Index.load(folder)
    begun = {"sites": list(found.widths), "dtype": found.dtype, "model": found.model, "source": found.source}
    now = {"sites": sites, "dtype": wanted.dtype, "model": wanted.model, "source": wanted.source}
    for key, value in now.items():
        if begun[key] != value:
            raise UsageError(
                f"{folder} was begun with another {key} ({_short(begun[key])}, not {_short(value)}); "
                "choose another folder or remove this one"
            )
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _labels(tokens: Tensor, rows: Tensor, positions: Tensor | None, kept: Tensor) -> dict[str, np.ndarray]:
    """Token, position and row of every kept vector."""
    if tokens.ndim != 2 or rows.shape != tokens.shape[:1] or kept.shape != tokens.shape:
        raise UsageError(
            f"tokens [batch, pos], rows [batch] and keep [batch, pos] do not fit: {list(tokens.shape)}, "
            f"{list(rows.shape)}, {list(kept.shape)}"
        )
    at = torch.arange(tokens.shape[1]) if positions is None else positions.cpu()
    whole = {"tokens": tokens.cpu(), "positions": at.expand(tokens.shape), "rows": rows.cpu()[:, None]}
    return {name: x.expand(tokens.shape)[kept].numpy().astype(LABELS[name]) for name, x in whole.items()}
