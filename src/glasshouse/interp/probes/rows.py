"""Activations and labels as probes take them: checked once, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.base.rng import generator

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Array = ArrayLike | Tensor

FEWEST = 4  # rows of each class below which a probe and its test say nothing


def plain(x: Array) -> NDArray[Any]:
    """A numpy array of ``x``, which may be a torch tensor of any float dtype on any device."""
    if isinstance(x, Tensor):
        x = x.detach().to("cpu")
        return np.asarray(x.float() if x.is_floating_point() and x.element_size() < 4 else x)
    return np.asarray(x)


def activations(x: Array, what: str = "activations", width: int | None = None) -> Floats:
    """``x`` [n, d] or [n, pos, d] as float64.

    UsageError for another number of axes, no rows or another width; VerificationError for NaN or infinity.
    """
    out = plain(x).astype(np.float64)
    if out.ndim not in (2, 3) or 0 in out.shape:
        raise UsageError(f"{what}: expected [n, d] or [n, pos, d] with rows in it, got {list(out.shape)}")
    if width is not None and out.shape[-1] != width:
        raise UsageError(
            f"{what} are {out.shape[-1]} wide, but this probe was fitted on width {width}; "
            "read them from the site that the probe names"
        )
    bad = ~np.isfinite(out).reshape(len(out), -1).all(1)
    if bad.any():
        raise VerificationError(
            f"{what}: {int(bad.sum())} of {len(out)} rows hold NaN or infinity, the first is row "
            f"{int(bad.argmax())}; no probe can be fitted on them or read them"
        )
    return out


def classes(y: Array, n: int, fewest: int = FEWEST, what: str = "labels") -> Bools:
    """``y`` [n] as booleans. UsageError for another length or other values than two; VerificationError when a
    class has fewer than ``fewest`` rows.
    """
    raw = plain(y)
    if raw.shape != (n,):
        raise UsageError(f"{what}: expected [{n}], one for each row of activations, got {list(raw.shape)}")
    if raw.dtype != np.bool_ and not np.isin(raw, (0, 1)).all():
        raise UsageError(f"{what} must be true or false (1 or 0); got {sorted(set(raw.tolist()))[:4]}")
    out = raw.astype(bool)
    many, few = int(out.sum()), int((~out).sum())
    if many == 0 or few == 0:
        raise VerificationError(
            f"{what}: all {n} rows are of one class ({bool(many)}); a probe needs examples of both classes"
        )
    if min(many, few) < fewest:
        raise VerificationError(
            f"{what}: {many} positive and {few} negative rows are too few; each class needs at least {fewest}"
        )
    return out


def positions(mask: Array | None, x: Floats) -> Bools:
    """Which positions [n, pos] of ``x`` [n, pos, d] are read (default all).

    UsageError when the shape differs or a row has no position left to read.
    """
    if mask is None:
        return np.ones(x.shape[:2], dtype=bool)
    out = plain(mask).astype(bool)
    if out.shape != x.shape[:2]:
        raise UsageError(f"mask: expected {list(x.shape[:2])} (rows, positions), got {list(out.shape)}")
    if not out.any(1).all():
        raise UsageError(f"mask: row {int((~out.any(1)).argmax())} has no position left to read")
    return out


def grouped(groups: Sequence[object] | Array | None, n: int) -> NDArray[np.int64]:
    """Numbers [n] of each row's group (rows of one meaning); every row its own when there are none."""
    if groups is None:
        return np.arange(n)
    listed: Any = plain(groups).tolist() if isinstance(groups, Tensor) else groups
    names = [str(g) for g in listed]
    if len(names) != n:
        raise UsageError(f"groups: expected {n}, one for each row of activations, got {len(names)}")
    known = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([known[name] for name in names], dtype=np.int64)


def split(
    labels: Bools, group: NDArray[np.int64], shares: Sequence[float], seed: int, purpose: str = "split"
) -> NDArray[np.int64]:
    """Part 0, 1, ... of each row [n], whole groups together, in about the given ``shares``.

    Groups of one class are dealt out class by class, so that every part has both. VerificationError when a
    part is left without a class.
    """
    rng, part = generator(purpose, seed), np.empty(len(labels), dtype=np.int64)
    rate = np.bincount(group, labels) / np.bincount(group)
    ends = np.cumsum(shares) / np.sum(shares)
    for kind in (rate == 0, rate == 1, (rate > 0) & (rate < 1)):
        members = rng.permutation(np.flatnonzero(kind))
        place = (np.arange(len(members)) + 0.5) / max(1, len(members))
        of = dict(zip(members.tolist(), np.searchsorted(ends, place, side="right").tolist(), strict=True))
        for row in np.flatnonzero(kind[group]):
            part[row] = of[int(group[row])]
    for p in range(len(shares)):
        here = labels[part == p]
        if here.all() or not here.any():  # also when it is empty
            raise VerificationError(
                f"{len(set(group.tolist()))} meanings are too few to hold any out: part {p + 1} of "
                f"{len(shares)} would have {int(here.sum())} positive and {int((~here).sum())} negative rows"
            )
    return part


def folds(labels: Bools, group: NDArray[np.int64], n: int, seed: int = 0) -> list[tuple[Any, Any]]:
    """(train, test) row numbers of up to ``n`` folds, whole groups together, both classes in every fold."""
    rate = np.bincount(group, labels) / np.bincount(group)
    smallest = min(int((rate > 0).sum()), int((rate < 1).sum()))
    n = min(n, smallest)
    if n < 2:
        raise VerificationError("cross-validation needs at least two meanings of each class; give c or alpha")
    part = split(labels, group, [1.0] * n, seed, "folds")
    return [(np.flatnonzero(part != p), np.flatnonzero(part == p)) for p in range(n)]
