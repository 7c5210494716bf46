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
    known = [abs(v) for row in values for v in row if math.isfinite(v)]
    largest = max([1.0, *known])
    left = 14.0 + 6.6 * min(16, max((len(r) for r in rows), default=1)) + (14 if row_title else 0)
    size = max(17.0, min(54.0, (width - left - 8) / max(1, len(columns))))
    tall = max(20.0, min(34.0, size))
    slanted = any(len(c) * 6.6 > size - 4 for c in columns)
    head = 12 + 5.0 * min(14, max((len(c) for c in columns), default=0)) if slanted else 22.0
    full = max(float(min(width, 320)), left + size * len(columns) + (36 if slanted else 8))
    parts: list[Markup] = []
    for j, column in enumerate(columns):
        at = left + (j + 0.5) * size
        turn = {"transform": f"rotate(-45 {num(at)} {num(head - 6)})"} if slanted else {}
        parts.append(
            text(
                at,
                head - 6,
                shorten(column, 92 if slanted else size),
                anchor=None if slanted else "middle",
                **turn,
            )
        )
    for i, row in enumerate(rows):
        y = head + (len(rows) - 1 - i) * tall
        parts.append(text(left - 7, y + tall / 2 + 4, shorten(row, 110), anchor="end"))
        for j in range(len(columns)):
            x = left + j * size
            value = values[i][j] if i < len(values) and j < len(values[i]) else math.nan
            parts.append(
                el("rect", x=x + 1, y=y + 1, width=size - 2, height=tall - 2, rx=2, class_="cell-back")
            )
            if not math.isfinite(value):
                continue
            share = abs(value) / largest
            tip = el("title", f"{row}, {columns[j]}: {label(value)}")
            kind = "cell neg" if value < 0 else "cell"
            parts.append(
                el(
                    "rect",
                    tip,
                    x=x + 1,
                    y=y + 1,
                    width=size - 2,
                    height=tall - 2,
                    rx=2,
                    class_=kind,
                    fill_opacity=f"{share:.3f}",
                )
            )
            if size >= 30:
                ink = "on" if share > 0.55 else "value"
                parts.append(
                    text(x + size / 2, y + tall / 2 + 4, f"{value:.2f}", ink, "middle", pointer_events="none")
                )
    foot = head + len(rows) * tall
    if row_title:
        parts.append(
            text(
                0,
                0,
                row_title,
                anchor="middle",
                transform=f"translate(10 {num((head + foot) / 2)}) rotate(-90)",
            )
        )
    if column_title:
        parts.append(text(left, foot + 17, column_title))
    return figure(full, foot + (24 if column_title else 4), title, desc, *parts)


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
