"""Whether another seed finds the same features: cosines between the rows of two decoders.

MMCS is each row's best cosine with the other dictionary (Sharkey et al. 2022); matching one to one, by the
Hungarian method, does not let one feature stand for many (Paulo & Belrose 2025, arXiv 2501.16615, who find
that large dictionaries share few features between seeds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.draw import table
from glasshouse.interp.dictionaries.core import Dictionary

SHARED = 0.7  # cosine from which a matched pair counts as one feature (Paulo & Belrose)


@dataclass(frozen=True)
class Stability:
    """``mmcs``: mean best cosine; ``matched``: mean cosine of one-to-one pairs; ``shared``: share of pairs
    with at least `SHARED`; ``random``: ``matched`` of random rows of the same shape, which is not zero.
    """

    mmcs: Score
    matched: Score
    shared: Score
    random: Score

    def _repr_html_(self) -> str:
        names = ("best cosine (MMCS)", "matched one to one", f"share with {SHARED}", "random rows, matched")
        scores = (self.mmcs, self.matched, self.shared, self.random)
        return str(table(("two seeds", "score"), list(zip(names, scores, strict=True)), "seed stability"))


def assign(cost: Any) -> NDArray[np.int64]:
    """The column for each row of ``cost`` [n, m], n <= m, that makes the sum least.

    Shortest augmenting paths (Jonker & Volgenant 1987), O(n^2 m), a row of numpy at a time.
    """
    cost = np.asarray(cost, dtype=np.float64)
    n, m = cost.shape
    if n > m or not np.isfinite(cost).all():
        raise UsageError(f"assigning needs a finite matrix with no more rows than columns; got {n} x {m}")
    u, v = np.zeros(n), np.zeros(m)
    row_of, column_of = np.full(m, -1), np.full(n, -1)
    for start in range(n):
        best, via, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        row, least, tree = start, 0.0, [start]
        while True:
            reduced = least + cost[row] - u[row] - v
            shorter = ~done & (reduced < best)
            best[shorter], via[shorter] = reduced[shorter], row
            open_ = np.where(done, np.inf, best)
            column = int(open_.argmin())
            least = float(open_[column])
            done[column] = True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
            tree.append(row)
        u[start] += least
        for other in tree[1:]:
            u[other] += least - best[column_of[other]]
        v[done] -= least - best[done]
        while True:
            row = int(via[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == start:
                break
    return column_of.astype(np.int64)


def _unit(rows: Tensor) -> NDArray[np.float64]:
    rows = rows.detach().double().cpu()
    found: NDArray[np.float64] = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).numpy()
    return found


def seed_stability(
    one: Dictionary, other: Dictionary, *, alive: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> Stability:
    """Compare two dictionaries of one site trained from different seeds, by their decoders.

    ``alive`` bool [d_sae] of each: dead features are where they began and would say nothing; None: all.
    UsageError when they write activations of different widths, VerificationError when none is alive.
    """
    if one.config.out != other.config.out:
        raise UsageError(f"dictionaries of widths {one.config.out} and {other.config.out} have no cosine")
    kept = [
        d.W_dec if alive is None else d.W_dec[alive[i].to(d.W_dec.device)] for i, d in enumerate((one, other))
    ]
    if not all(len(rows) for rows in kept):
        raise VerificationError("no feature is alive: there is nothing to compare")
    a, b = sorted((_unit(rows) for rows in kept), key=len)
    cosine = a @ b.T
    pairs = cosine[np.arange(len(a)), assign(-cosine)]
    drawn = torch.Generator().manual_seed(seed)
    x, y = (_unit(torch.randn(rows.shape, generator=drawn)) for rows in (a, b))
    chance = x @ y.T
    return Stability(
        bootstrap(cosine.max(1)),
        bootstrap(pairs),
        rate(int((pairs >= SHARED).sum()), len(pairs)),
        bootstrap(chance[np.arange(len(x)), assign(-chance)]),
    )
