"""What a change at each of many places did to a metric, with intervals over rows; it shows itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import esc, heat_map, styled, table
from glasshouse.interp.attribution.places import Place

DRAWS = 1000
SMALLEST_GAP = 1e-6  # of a metric between clean and corrupt rows: below it a share of it means nothing


@dataclass(frozen=True)
class Effects:
    """Effects of changes at places, per row.

    ``per_row`` float64 [place, n] in the metric's units; ``gap`` [n]: the metric on clean rows less that on
    corrupt ones, or None. Where there is a gap, values are shares of it: mean effect over mean gap, so
    1 = the change does as much as exchanging the whole input. Intervals are 95%, bootstrapped over rows.
    ``method`` says what was done, with what in place of what; ``metric`` what was measured.
    """

    names: tuple[str, ...]
    per_row: Tensor
    method: str
    metric: str
    cells: tuple[tuple[str, str], ...]
    gap: Tensor | None = None

    def __post_init__(self) -> None:
        if not torch.isfinite(self.per_row).all():
            rows, bad = (~torch.isfinite(self.per_row)).nonzero()[0].tolist()
            raise UsageError(
                f"{self.method}: the effect at {self.names[rows]} on row {bad} is not finite; look for "
                "NaN in the model's weights or activations"
            )

    @property
    def n(self) -> int:
        """Rows behind every effect."""
        return self.per_row.shape[1]

    @property
    def values(self) -> NDArray[np.float64]:
        """The effect [place]: a share of the gap where there is one, else in the metric's units."""
        return self._of(np.full((1, self.n), 1.0))[:, 0]

    def _of(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Effects [place, draw] when row i counts ``counts[draw, i]`` times."""
        total = self.per_row.double().cpu().numpy() @ counts.T
        below = counts.sum(1) if self.gap is None else self.gap.double().cpu().numpy() @ counts.T
        return total / np.where(np.abs(below) < 1e-12, np.nan, below)

    def scores(self) -> dict[str, Score]:
        """The effect at every place with its interval."""
        if self.n < 3:  # as `bootstrap` has it: the rows' own range
            each = self._of(np.eye(self.n))
        else:
            rng = np.random.default_rng(0)
            each = self._of(rng.multinomial(self.n, np.full(self.n, 1 / self.n), size=DRAWS).astype(float))
        quantiles = (0.0, 1.0) if self.n < 3 else (0.025, 0.975)
        low, high = np.nanquantile(each, quantiles, axis=1)
        return {
            name: Score(float(v), float(min(v, a)), float(max(v, b)), self.n)
            for name, v, a, b in zip(self.names, self.values, low, high, strict=True)
        }

    def __getitem__(self, name: str) -> Score:
        if name not in self.names:
            raise UsageError(f"no effect was measured at {name!r}.{suggest(name, self.names)}")
        at = self.names.index(name)
        one = Effects((name,), self.per_row[[at]], self.method, self.metric, (self.cells[at],), self.gap)
        return one.scores()[name]

    def top(self, k: int = 10) -> dict[str, Score]:
        """The ``k`` largest effects by size, largest first."""
        scores = self.scores()
        return {name: scores[name] for name in sorted(scores, key=lambda n: -abs(scores[n].value))[:k]}

    def correlation(self, other: Effects) -> Score:
        """Pearson's correlation over places with another method's effects on the same rows, with its interval
        over rows. UsageError when places or rows differ, or either has no spread.
        """
        if self.names != other.names or self.n != other.n or len(self.names) < 3:
            raise UsageError("a correlation needs the same three or more places and the same rows in both")

        def of(rows: NDArray[np.float64]) -> float:
            counts = np.bincount(rows.astype(int), minlength=self.n).astype(float)[None]
            a, b = self._of(counts)[:, 0], other._of(counts)[:, 0]
            return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")

        if not np.isfinite(of(np.arange(self.n, dtype=float))):
            raise UsageError("the effects are the same everywhere; nothing can correlate with them")
        if self.n < 3:
            value = of(np.arange(self.n, dtype=float))
            each = [of(np.full(1, float(i))) for i in range(self.n)]
            return Score(value, min(value, *each), max(value, *each), self.n)
        return bootstrap(np.arange(self.n), of, draws=300)

    def __str__(self) -> str:
        lines = [self._headline(), *(f"  {name:20s} {score}" for name, score in self.top().items())]
        return "\n".join(lines)

    def _headline(self) -> str:
        unit = f"{self.metric}" if self.gap is None else f"share of the gap in {self.metric}"
        return f"{self.method}; {unit}; n = {self.n} rows"

    def _repr_html_(self) -> str:
        return styled(self._drawn())

    def _drawn(self) -> Markup:
        rows, columns = (list(dict.fromkeys(c[i] for c in self.cells)) for i in (0, 1))
        grid = [[float("nan")] * len(columns) for _ in rows]
        for (row, column), value in zip(self.cells, self.values, strict=True):
            grid[rows.index(row)][columns.index(column)] = float(value)
        picture = heat_map(grid, rows, columns, self.method, self._headline())
        shown = [[n, f"{s.value:.3f}", f"[{s.low:.3f}, {s.high:.3f}]"] for n, s in self.top().items()]
        ranked = table(["place", "effect", "95% interval"], shown, "Largest effects", numeric=(1,))
        return Markup("<p>{}</p>{}{}").format(esc(self._headline()), picture, ranked)


def effects(
    places: Iterable[Place], per_row: Tensor, method: str, metric: object, gap: Tensor | None = None
) -> Effects:
    """Effects at ``places``; UsageError when ``gap`` [n] is nothing on average, or not finite."""
    chosen = list(places)
    if gap is not None:
        mean = float(gap.double().mean())
        if not np.isfinite(mean):
            raise UsageError(f"{describe(metric)} is not finite on these rows; nothing can be a share of it")
        if abs(mean) < SMALLEST_GAP:
            raise UsageError(
                f"{describe(metric)} is the same on clean and corrupt rows (mean gap {mean:.2g}); there is "
                "nothing to restore: choose rows that differ where the behaviour is decided"
            )
    names, cells = tuple(p.name for p in chosen), tuple(p.cell for p in chosen)
    return Effects(names, per_row.double(), method, describe(metric), cells, gap)


def describe(metric: object) -> str:
    """What to call a metric: its class's name, or its function's."""
    name = getattr(metric, "__name__", type(metric).__name__)
    return "the metric" if name == "<lambda>" else name
