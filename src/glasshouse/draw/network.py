"""Layered graphs: nodes on levels from below to above, links as curves between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glasshouse.draw.svg import el, figure, num, shorten, text

TALL, LEAST, MOST = 46.0, 0.7, 5.0  # pixels between levels; thinnest and thickest link


@dataclass(frozen=True)
class Node:
    """A node: its name, the level it stands on (0 below), and its place from left (0) to right (1)."""

    name: str
    level: int
    place: float


@dataclass(frozen=True)
class Link:
    """A link between two nodes by name; its width tells the size of ``weight``, its colour the sign.

    ``note`` is shown on hover; ``side`` ("q", "k", "v" or nothing) makes links that end in one node part.
    """

    source: str
    target: str
    weight: float
    note: str = ""
    side: str = ""


def network(
    nodes: Sequence[Node], links: Sequence[Link], title: str, desc: str, *, width: int = 760
) -> Markup:
    """The picture. Levels that hold no node take no room; a link to a name that is no node is left out."""
    used = sorted({n.level for n in nodes})
    foot = 24.0 + TALL * max(0, len(used) - 1)
    at = {
        n.name: (40 + (width - 80) * min(1.0, max(0.0, n.place)), foot - TALL * used.index(n.level))
        for n in nodes
    }
    largest = max((abs(k.weight) for k in links if math.isfinite(k.weight)), default=0.0) or 1.0
    parts = [_curve(k, at, largest) for k in links if k.source in at and k.target in at]
    for node in nodes:
        x, y = at[node.name]
        wide = 12.0 + 6.6 * min(len(node.name), 14)
        parts.append(el("rect", x=x - wide / 2, y=y - 10, width=wide, height=20, rx=6, class_="cell-back"))
        parts.append(text(x, y + 4, shorten(node.name, 96), "strong", "middle"))
    return figure(float(width), foot + 18, title, desc, *parts)


def _curve(link: Link, at: dict[str, tuple[float, float]], largest: float) -> Markup:
    (x0, y0), (x1, y1) = at[link.source], at[link.target]
    x1 += {"q": -12.0, "k": 0.0, "v": 12.0}.get(link.side, 0.0)
    y0, y1 = y0 - 10, y1 + 10
    middle = (y0 + y1) / 2
    # Curves between nodes that stand above each other bow aside, or they would hide behind what is between.
    bow = 18.0 * max(0.0, (y0 - y1) / TALL - 1) if abs(x1 - x0) < 30 else 0.0
    bow = min(bow, 160.0)
    share = min(1.0, abs(link.weight) / largest) if math.isfinite(link.weight) else 0.0
    bends = f"{num(x0 + bow)} {num(middle)} {num(x1 + bow)} {num(middle)}"
    d = f"M{num(x0)} {num(y0)}C{bends} {num(x1)} {num(y1)}"
    return el(
        "path",
        el("title", link.note or f"{link.source} to {link.target}"),
        d=d,
        class_=f"line {'c2' if link.weight < 0 else 'c0'}",
        style=f"stroke-width:{num(LEAST + (MOST - LEAST) * math.sqrt(share))}px",
        stroke_opacity=f"{0.35 + 0.65 * share:.2f}",
    )
