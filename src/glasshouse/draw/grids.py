"""Heat maps (layer by token) and horizontal bars (rankings)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glasshouse.draw.scale import Scale, label
from glasshouse.draw.svg import el, figure, num, shorten, text


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    desc: str,
    *,
    width: int = 760,
    row_title: str = "",
    column_title: str = "",
) -> Markup:
    """Values [row][column] as shades; row 0 stands at the *bottom*, as layers are drawn in the field.

    Shade is |value| over the largest |value|, at least 1 (so a recovery of 1 is full ink and noise stays
    pale); negative values take the other colour. A value that is missing or not finite leaves its cell
    empty.
    """
    largest = max([1.0, *(abs(v) for row in values for v in row if math.isfinite(v))])
    grid = _Grid.fitting(rows, columns, width, bool(row_title))
    parts = [grid.column_name(j, column) for j, column in enumerate(columns)]
    for i, row in enumerate(rows):
        y = grid.top(i)
        parts.append(text(grid.left - 7, y + grid.tall / 2 + 4, shorten(row, 110), anchor="end"))
        for j, column in enumerate(columns):
            value = values[i][j] if i < len(values) and j < len(values[i]) else math.nan
            parts += grid.cell(grid.left + j * grid.size, y, value, largest, f"{row}, {column}")
    if row_title:
        turn = f"translate(10 {num((grid.head + grid.foot) / 2)}) rotate(-90)"
        parts.append(text(0, 0, row_title, anchor="middle", transform=turn))
    if column_title:
        parts.append(text(grid.left, grid.foot + 17, column_title))
    return figure(grid.full, grid.foot + (24 if column_title else 4), title, desc, *parts)


@dataclass(frozen=True)
class _Grid:
    """Where a heat map's cells stand, in pixels."""

    left: float  # where the cells begin; row names stand before it
    head: float  # the height that column names take
    size: float  # a cell's width
    tall: float  # a cell's height
    full: float  # the width of the whole figure
    n_rows: int
    slanted: bool  # column names are turned because they would not fit side by side

    @classmethod
    def fitting(cls, rows: Sequence[str], columns: Sequence[str], width: int, row_title: bool) -> _Grid:
        """The largest readable cells with which the map is about ``width`` wide."""
        left = 14.0 + 6.6 * min(16, max((len(r) for r in rows), default=1)) + (14 if row_title else 0)
        size = max(17.0, min(54.0, (width - left - 8) / max(1, len(columns))))
        slanted = any(len(c) * 6.6 > size - 4 for c in columns)
        head = 12 + 5.0 * min(14, max((len(c) for c in columns), default=0)) if slanted else 22.0
        full = max(float(min(width, 320)), left + size * len(columns) + (36 if slanted else 8))
        return cls(left, head, size, max(20.0, min(34.0, size)), full, len(rows), slanted)

    @property
    def foot(self) -> float:
        """Where the bottom row ends."""
        return self.head + self.n_rows * self.tall

    def top(self, row: int) -> float:
        """Where a row's cells begin; row 0 is the bottom one."""
        return self.head + (self.n_rows - 1 - row) * self.tall

    def column_name(self, column: int, name: str) -> Markup:
        """A column's name above it."""
        at, y = self.left + (column + 0.5) * self.size, self.head - 6
        if self.slanted:
            return text(at, y, shorten(name, 92), transform=f"rotate(-45 {num(at)} {num(y)})")
        return text(at, y, shorten(name, self.size), anchor="middle")

    def cell(self, x: float, y: float, value: float, largest: float, name: str) -> list[Markup]:
        """One cell: its empty back and, where the value is finite, its shade and perhaps the number."""
        box = {"x": x + 1, "y": y + 1, "width": self.size - 2, "height": self.tall - 2, "rx": 2}
        parts = [el("rect", **box, class_="cell-back")]
        if not math.isfinite(value):
            return parts
        share = abs(value) / largest
        tip = el("title", f"{name}: {label(value)}")
        kind = "cell neg" if value < 0 else "cell"
        parts.append(el("rect", tip, **box, class_=kind, fill_opacity=f"{share:.3f}"))
        if self.size >= 30:
            middle, ink = (x + self.size / 2, y + self.tall / 2 + 4), "on" if share > 0.55 else "value"
            parts.append(text(*middle, f"{value:z.2f}", ink, "middle", pointer_events="none"))
        return parts


@dataclass(frozen=True)
class Bar:
    """One row of a ranking; `hot` draws the eye to it, `note` stands behind the value."""

    name: str
    value: float
    hot: bool = False
    note: str = ""


def bars(rows: Sequence[Bar], title: str, desc: str, *, width: int = 760) -> Markup:
    """Horizontal bars from zero, in the order given; negative values run left of the zero line."""
    known = [r.value for r in rows if math.isfinite(r.value)]
    narrow = width < 520
    left = min(width * 0.36, 16 + 6.8 * max((len(r.name) for r in rows), default=4))
    right = width - (84.0 if narrow else 230.0)
    lo, hi = min([0.0, *known]), max([0.0, *known])
    x = Scale(lo, hi if hi > lo else lo + 1.0, left, right)
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        y = i * 22.0
        parts.append(text(left - 8, y + 15, shorten(row.name, left - 8), "strong" if row.hot else "", "end"))
        parts.append(el("rect", x=left, y=y + 4, width=right - left, height=14, rx=2, class_="bar-back"))
        if math.isfinite(row.value):
            a, b = sorted((x(0.0), x(row.value)))
            tip = el("title", f"{row.name}: {label(row.value)}")
            kind = "bar hot" if row.hot else "bar"
            parts.append(el("rect", tip, x=a, y=y + 4, width=max(1.0, b - a), height=14, rx=2, class_=kind))
        shown = label(row.value) + (f"  {row.note}" if row.note and not narrow else "")
        parts.append(text(right + 8, y + 15, shorten(shown, width - right - 8), "strong" if row.hot else ""))
    return figure(width, 22.0 * len(rows) + 4, title, desc, *parts)
