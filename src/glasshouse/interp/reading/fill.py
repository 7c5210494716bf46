"""Fill an activation store from a checkpoint, or step by step while a model trains."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError
from glasshouse.interp.reading.adapter import Readable, context_of
from glasshouse.interp.reading.store import ActivationStore
from glasshouse.interp.reading.writer import SHARD, StoreWriter
from glasshouse.model import Taps
from glasshouse.model.digest import weights_digest

Rows = Tensor | np.ndarray | Sequence[Sequence[int]]


def fill(
    folder: str | Path,
    model: Readable,
    token_rows: Rows,
    sites: str | Sequence[str],
    *,
    dtype: str = "float32",
    batch: int = 8,
    shard: int = SHARD,
    numbers: Sequence[int] | None = None,
    skip_first: int = 0,
) -> ActivationStore:
    """Store the activations of ``model`` at ``sites`` (names, patterns) on every token of ``token_rows``.

    ``token_rows``: int [n, pos], which may be memory-mapped, or rows of different lengths, each within the
    context. ``numbers``: the number of each row, such as its document's (None: 0, 1, ...). ``skip_first``:
    positions at the start of a row that are not stored (the first token's activations are outliers).
    ``batch``: rows a pass, which never changes what is stored but in rounding. Called again after it was
    killed, with the same arguments, it goes on where it stopped and ends with the same bytes.

    UsageError for no site, a site with no vector per position (``pattern``), unequal rows where the model
    looks ahead, or a folder filled differently; DataError for no rows, an empty or too long row, a token
    outside the vocabulary, or activations that are not finite, naming the row.
    """
    if batch < 1:
        raise UsageError(f"a pass reads at least 1 row, not {batch}")
    names = sites_of(model, sites)
    digest = _checked(model, token_rows)
    labels = torch.arange(len(token_rows)) if numbers is None else torch.as_tensor(numbers)
    source = {"rows": len(token_rows), "sha256": digest, "batch": batch, "skip_first": skip_first}
    if numbers is not None:
        source["numbers"] = hashlib.sha256(labels.long().numpy().tobytes()).hexdigest()
    with StoreWriter(
        folder, names, model=weights_digest(model), dtype=dtype, shard=shard, source=source
    ) as writer:
        if not writer.index.complete:
            for mark, start in enumerate(range(0, len(token_rows), batch)):
                if mark >= writer.mark:  # the batch that a shard ended in may be stored in part
                    tokens, kept = _padded(token_rows[start : start + batch])
                    kept[:, :skip_first] = False
                    acts = _read(model, tokens, names)
                    writer.append(acts, tokens, labels[start : start + batch], keep=kept, mark=mark)
            writer.finish()
    return ActivationStore(folder)


def record(
    writer: StoreWriter, model: Readable, tokens: Tensor, step: int, rows: Tensor | None = None
) -> int:
    """Add what ``model``, as it is now, computes on ``tokens`` [batch, pos] to ``writer``; returns how many
    vectors were new.

    For training loops: call it with the step's batch, from an objective or between steps. It runs a pass of
    its own, without gradients, up to the deepest site. ``rows``: document numbers [batch] (None: 0, 1, ...).
    A training run resumed from a checkpoint may record its steps again: what is stored is left out, provided
    that ``writer.flush()`` was called when the checkpoint was saved.
    """
    numbers = torch.arange(len(tokens)) if rows is None else rows
    return writer.append(_read(model, tokens, writer.sites), tokens, numbers, mark=step)


def sites_of(model: Readable, sites: str | Sequence[str]) -> list[str]:
    """The model's sites that names, patterns or hook names stand for, in order of computation."""
    taps = Taps(read=sites)
    taps.check(model.sites(), model.hook_names)
    if not taps.asked:
        raise UsageError("no site asked for; model.sites() lists all")
    return taps.asked


@torch.no_grad()
def _read(model: Readable, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    with Taps(read=names, stop_early=True) as taps:
        model(tokens.to(model.device), taps)
    return taps.acts


def _padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows as tokens int64 [batch, pos], padded on the right, and which of them are real, bool [batch, pos].

    A causal model computes the real ones as if nothing followed.
    """
    lists = [torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
    lengths = torch.tensor([len(row) for row in lists])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _checked(model: Readable, rows: Rows) -> str:
    """SHA-256 of the rows; an error names the first that the model cannot read."""
    if not len(rows):
        raise DataError("there are no token rows to read activations from")
    whole, lengths = hashlib.sha256(), set()
    context, vocabulary = context_of(model), model.config.vocab_size
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"row {number} is not a row of token ids [pos]: {ids.dtype} {list(ids.shape)}")
        if context is not None and len(ids) > context:
            raise DataError(
                f"row {number} has {len(ids)} tokens and the context is {context}: cut it into windows"
            )
        if not 0 <= ids.min() <= ids.max() < vocabulary:
            raise DataError(f"row {number} has a token outside the vocabulary of {vocabulary}")
        lengths.add(len(ids))
        whole.update(ids.astype("<i8").tobytes() + b"\n")
    if len(lengths) > 1 and not getattr(model.config, "causal", True):
        raise UsageError("this model looks ahead, so rows of different lengths cannot share a pass; pad them")
    return whole.hexdigest()
