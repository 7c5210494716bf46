"""Line charts over training, with the gate lane beneath them.

The lane shares the chart's horizontal axis: one row a constraint, one mark a verdict, at the update at
which the checkpoint was saved. Reading down from a bend in a curve leads to what was found there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from glasshouse.draw.scale import Scale, domain, finite, label, log_ticks, ticks
from glasshouse.draw.svg import el, figure, num, shorten, status_class, status_mark, text

NARROW = 520  # below this width names stand above their rows instead of in a margin beside them
_MOST_POINTS = 360


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y) in x order. `style` is line, thin, dots or both; `faint` dashes it.

    A curve in pieces (a stage ended, a branch was rolled back) is several series of one colour and name, of
    which one is `labelled`. `statuses`, one a point, draws verdict marks instead of dots.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    style: str = "line"
    faint: bool = False
    labelled: bool = True
    intervals: Sequence[tuple[float, float, float]] = ()  # (x, low, high)
    statuses: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """A verdict in the lane: where, which status, and what its tooltip says."""

    x: float
    status: str
    label: str = ""


@dataclass(frozen=True)
class Lane:
    """One row beneath the chart."""

    name: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Axes:
    """What surrounds the curves: shaded spans (x0, x1, label), rules (x, label), bounds (y, label)."""

    x_label: str = "updates"
    y_label: str = ""
    log: bool = False
    spans: Sequence[tuple[float, float, str]] = ()
    rules: Sequence[tuple[float, str]] = ()
    bounds: Sequence[tuple[float, str]] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    lanes: Sequence[Lane] = field(default_factory=tuple)


def thin(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: means of equal runs of neighbours (not finite where a member is not)."""
    if len(points) <= most:
        return list(points)
    run = math.ceil(len(points) / most)
    out = []
    for at in range(0, len(points), run):
        chunk = points[at : at + run]
        out.append((chunk[len(chunk) // 2][0], sum(y / len(chunk) for _, y in chunk)))
    return out


def _curve(series: Series, x: Scale, y: Scale) -> Markup:
    """The marks of one series; the line breaks where a value is not finite."""
    tone = f"c{series.color % 5}" + (" faint" if series.faint else "")
    parts: list[Markup] = []
    for at, lo, hi in series.intervals:
        if all(math.isfinite(v) for v in (at, lo, hi)):
            parts.append(el("path", d=f"M{num(x(at))} {num(y(lo))}V{num(y(hi))}", class_=f"line {tone}"))
    points = list(series.points) if series.statuses else thin(series.points)
    if series.style != "dots":
        commands, pen = [], "M"
        for px, py in points:
            if not (math.isfinite(px) and math.isfinite(py)):
                pen = "M"
                continue
            commands.append(f"{pen}{num(x(px))} {num(y(py))}")
            pen = "L"
        kind = "line thin" if series.style == "thin" else "line"
        if commands:
            parts.append(el("path", d="".join(commands), class_=f"{kind} {tone}"))
    if series.style in ("dots", "both"):
        for i, (px, py) in enumerate(points):
            if not (math.isfinite(px) and math.isfinite(py)):
                continue
            tip = f"{series.name}: {label(py)} at {label(px)}"
            if i < len(series.statuses):
                parts.append(
                    status_mark(x(px), y(py), series.statuses[i], f"{series.statuses[i]}, {tip}", 4.5)
                )
            else:
                parts.append(el("circle", el("title", tip), cx=x(px), cy=y(py), r=2.6, class_=f"dot {tone}"))
    return el("g", *parts) if parts else Markup()


def _end_labels(series: Sequence[Series], x: float, y: Scale, low: float) -> list[Markup]:
    """Names at the right ends of the curves, pushed apart so that none covers another."""
    ends = []
    for one in series:
        known = [py for px, py in one.points if math.isfinite(px) and math.isfinite(py)]
        if known and one.name and one.labelled:
            ends.append((y(known[-1]), one))
    ends.sort(key=lambda end: end[0])
    out, last = [], -math.inf
    at = [0.0] * len(ends)
    for i, (want, _) in enumerate(ends):
        at[i] = last = max(want, last + 15)
    overshoot = max(0.0, (at[-1] - low) if at else 0.0)
    for (_, one), place in zip(ends, at, strict=True):
        out.append(text(x, place - overshoot + 4, shorten(one.name, 130), f"c{one.color % 5}"))
    return out


def _legend(series: Sequence[Series], y: float) -> list[Markup]:
    """Names in a row above a chart too narrow for labels at its right."""
    out, at = [], 0.0
    for one in series:
        if one.name and one.labelled:
            shown = shorten(one.name, 150)
            out.append(el("path", d=f"M{num(at)} {num(y - 4)}h12", class_=f"line c{one.color % 5}"))
            out.append(text(at + 17, y, shown, f"c{one.color % 5}"))
            at += 17 + 6.6 * len(shown) + 14
    return out


def _lanes(
    lanes: Sequence[Lane], x: Scale, top: float, right: float, narrow: bool
) -> tuple[list[Markup], float]:
    """Rows of verdict marks from `top` down, and the height they take."""
    out: list[Markup] = []
    row = 32.0 if narrow else 23.0
    for i, lane in enumerate(lanes):
        y = top + i * row + (22 if narrow else 12)
        name = shorten(lane.name, right if narrow else 150)
        out.append(text(x.start, y - 11, name) if narrow else text(right + 12, y + 4, name))
        out.append(el("path", d=f"M{num(x.start)} {num(y)}H{num(right)}", class_="grid"))
        out.extend(status_mark(x(m.x), y, m.status, m.label) for m in lane.marks if math.isfinite(m.x))
    return out, row * len(lanes)


def line_chart(
    series: Sequence[Series], title: str, desc: str, axes: Axes, *, width: int = 760, height: int = 250
) -> Markup:
    """Curves over a shared x axis, the lanes of `axes` beneath; `height` in pixels is the curves' part."""
    narrow = width < NARROW
    marks = [m.x for lane in axes.lanes for m in lane.marks]
    xs = finite([px for s in series for px, _ in s.points] + marks)
    ys = [py for s in series for _, py in s.points] + [b for b, _ in axes.bounds]
    ys += [v for s in series for _, lo, hi in s.intervals for v in (lo, hi)]
    log = axes.log and any(v > 0 for v in finite(ys))
    y_lo, y_hi = axes.y_range or domain(ys, log)
    legend = narrow and sum(bool(s.name) and s.labelled for s in series) > 1
    named = legend or narrow or any(s.name and s.labelled for s in series) or bool(axes.lanes)
    top, left = 22.0 + (20 if legend else 0) + (16 if axes.rules else 0), 44.0
    right = float(width - (16 if narrow or not named else 160))
    x_lo, x_hi = axes.x_range or (min(xs, default=0.0), max(xs, default=1.0))
    x_lo = (
        0.0 if 0 < x_lo < 0.05 * x_hi else x_lo
    )  # the first log line is a few updates in; the axis begins at none
    x = Scale(x_lo, x_hi, left, right)
    y = Scale(y_lo, y_hi, top + height, top, log)
    parts: list[Markup] = []
    for x0, x1, name in axes.spans:
        tip = el("title", name)
        parts.append(
            el("rect", tip, x=x(x0), y=top, width=max(1.0, x(x1) - x(x0)), height=height, class_="span")
        )
    for value in log_ticks(y_lo, y_hi) if log else ticks(y_lo, y_hi, 5):
        parts.append(el("path", d=f"M{num(left)} {num(y(value))}H{num(right)}", class_="grid"))
        parts.append(text(left - 7, y(value) + 4, label(value), anchor="end"))
    parts.append(text(0, 11, axes.y_label, "strong"))
    lane_top = top + height + 12
    rows, lane_height = _lanes(axes.lanes, x, lane_top, right, narrow)
    foot = lane_top + lane_height
    for at, name in axes.rules:
        parts.append(el("path", d=f"M{num(x(at))} {num(top - 6)}V{num(foot - 6)}", class_="rule"))
        parts.append(text(x(at) + 4, top - 5, shorten(name, 90)))
    for value, name in axes.bounds:
        parts.append(
            el("path", el("title", name), d=f"M{num(left)} {num(y(value))}H{num(right)}", class_="limit")
        )
    parts.extend(_curve(one, x, y) for one in series)
    parts.extend(
        _legend(series, 30) if legend else [] if narrow else _end_labels(series, right + 12, y, top + height)
    )
    parts.extend(rows)
    for value in ticks(x.lo, x.hi, 4 if narrow else 7):
        parts.append(text(x(value), foot + 10, label(value), anchor="middle"))
    parts.append(text(right, foot + 26, axes.x_label, anchor="end"))
    return figure(width, foot + 32, title, desc, *parts)


def interval_strip(
    estimate: float | None,
    interval: tuple[float, float] | None,
    allowed: tuple[float, float],
    status: str,
    title: str,
    *,
    width: int = 190,
    height: int = 30,
    span: tuple[float, float] = (0.0, 1.0),
) -> Markup:
    """Estimate and interval against the range the bound allows (shaded), on the axis `span`."""
    x = Scale(span[0], span[1], 6.0, width - 6.0)
    mid = height / 2
    lo, hi = max(allowed[0], span[0]), min(allowed[1], span[1])
    parts = [
        el("rect", x=x(lo), y=3, width=max(1.5, x(hi) - x(lo)), height=height - 6, class_="allowed"),
        el("path", d=f"M6 {num(mid)}H{num(width - 6)}", class_="grid"),
    ]
    parts.extend(
        el("path", d=f"M{num(x(b))} 3V{num(height - 3)}", class_="limit")
        for b in allowed
        if span[0] < b < span[1]
    )
    if interval is not None and all(math.isfinite(v) for v in interval):
        line = f"M{num(x(interval[0]))} {num(mid)}H{num(x(interval[1]))}"
        parts.append(el("path", d=line, class_=f"interval {status_class(status)}"))
    if estimate is not None and math.isfinite(estimate):
        parts.append(status_mark(x(estimate), mid, status, title, 4.5))
    return figure(width, height, title, title, *parts)
