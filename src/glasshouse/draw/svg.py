"""The few SVG parts every chart is made of.

Colours are CSS classes, never values: the page's style sheet (`STYLE`) gives each class a custom property,
so a chart follows light and dark mode and print without being drawn again. Bytes depend on the data alone:
no clock, no random id, coordinates rounded to a tenth of a pixel.
"""

from __future__ import annotations

from markupsafe import Markup

from glasshouse.draw.text import clean, esc

STATUSES = ("pass", "fail", "undecided", "not_applicable", "error")


def num(x: float) -> str:
    """A coordinate with at most one decimal, never "-0"."""
    text = f"{x:.1f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def el(tag: str, *children: Markup | str, **attrs: str | float | None) -> Markup:
    """One element. `class_` becomes class, underscores become hyphens, None is left out, text is escaped."""
    parts = []
    for name, value in attrs.items():
        if value is None:
            continue
        shown = num(value) if isinstance(value, (int, float)) else value
        # No limit here: a path is long, and words were cut where they came in.
        parts.append(f' {name.rstrip("_").replace("_", "-")}="{esc(shown, len(shown))}"')
    inside = Markup().join(esc(child, 4000) for child in children)
    head = Markup(f"<{tag}{''.join(parts)}")
    return head + Markup("/>") if not children else head + Markup(">") + inside + Markup(f"</{tag}>")


def figure(width: float, height: float, title: str, desc: str, *children: Markup) -> Markup:
    """A whole picture that scales with its box, named and described for readers who do not see it."""
    return el(
        "svg",
        el("title", clean(title, 200)),
        el("desc", clean(desc, 1500)),
        *children,
        class_="chart",
        role="img",
        aria_label=clean(title, 200),
        viewBox=f"0 0 {num(width)} {num(height)}",
        style=f"max-width:{num(width)}px",
    )


def text(
    x: float, y: float, content: str, class_: str = "", anchor: str | None = None, **attrs: str
) -> Markup:
    """One line of text whose baseline starts (or by `anchor` middles or ends) at x, y."""
    return el(
        "text", clean(content, 120), x=x, y=y, class_=f"t {class_}".strip(), text_anchor=anchor, **attrs
    )


def shorten(content: str, width: float, em: float = 6.3) -> str:
    """`content` cut with an ellipsis to about `width` pixels at chart text size (`em` pixels a letter)."""
    room = max(1, int(width / em))
    shown = clean(content, 200)
    return shown if len(shown) <= room else shown[: max(1, room - 1)] + "…"


def status_class(status: str) -> str:
    """The CSS class of a verdict status; anything unknown looks like an error, never like a pass."""
    return "s-" + (status if status in STATUSES else "error")


def status_mark(x: float, y: float, status: str, label: str, r: float = 5.0) -> Markup:
    """A verdict as a mark whose *shape* tells the status too: disc, cross, triangle, dash, square."""
    title = el("title", clean(label, 300)) if label else Markup()
    kind = status if status in STATUSES else "error"
    if kind == "pass":
        shape = el("circle", cx=x, cy=y, r=r - 0.8)
    elif kind == "fail":
        left, right, top, low = num(x - r), num(x + r), num(y - r), num(y + r)
        d = f"M{left} {top}L{right} {low}M{left} {low}L{right} {top}"
        shape = el("path", d=d, class_="stroke")
    elif kind == "undecided":
        d = f"M{num(x)} {num(y - r)}L{num(x + r)} {num(y + r * 0.8)}L{num(x - r)} {num(y + r * 0.8)}Z"
        shape = el("path", d=d, class_="hollow")
    elif kind == "not_applicable":
        shape = el("path", d=f"M{num(x - r * 0.7)} {num(y)}H{num(x + r * 0.7)}", class_="stroke")
    else:
        shape = el("rect", x=x - r, y=y - r, width=2 * r, height=2 * r)
    # A fat invisible disc makes the tooltip easy to hit.
    return el(
        "g",
        title,
        el("circle", cx=x, cy=y, r=r + 4, class_="hit"),
        shape,
        class_=f"mark {status_class(kind)}",
    )


STYLE = """
.chart{display:block;width:100%;height:auto;overflow:visible;font-family:var(--sans,system-ui,sans-serif)}
.chart .t{font-size:11.5px;fill:var(--soft,#5d665f);font-variant-numeric:tabular-nums}
.chart .t.strong{fill:var(--ink,#1e2420);font-weight:600}
.chart .t.value{fill:var(--ink,#1e2420)}
.chart .t.on{fill:var(--paper,#fff)}
.chart .grid{stroke:var(--line,#dfe2dc);stroke-width:1;fill:none}
.chart .axis{stroke:var(--soft,#5d665f);stroke-width:1;fill:none}
.chart .rule{stroke:var(--line,#dfe2dc);stroke-width:1;stroke-dasharray:2 3;fill:none}
.chart .span{fill:var(--fail,#b3261e);fill-opacity:.07}
.chart .allowed{fill:var(--pass,#2f7d4f);fill-opacity:.13}
.chart .limit{stroke:var(--ink,#1e2420);stroke-width:1.2;stroke-dasharray:5 3;fill:none}
.chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.chart .line.thin{stroke-width:1;stroke-opacity:.45}
.chart .line.faint{stroke-dasharray:3 3.5;stroke-opacity:.55}
.chart .dot.faint{fill-opacity:.4}
.chart .c0{stroke:var(--c0,#2f6f5e)}.chart .c1{stroke:var(--c1,#b0642a)}.chart .c2{stroke:var(--c2,#4a5fa5)}
.chart .c3{stroke:var(--c3,#8a4a7d)}.chart .c4{stroke:var(--c4,#6b7280)}
.chart .dot{stroke:none}
.chart .dot.c0{fill:var(--c0,#2f6f5e)}.chart .dot.c1{fill:var(--c1,#b0642a)}
.chart .dot.c2{fill:var(--c2,#4a5fa5)}
.chart .dot.c3{fill:var(--c3,#8a4a7d)}.chart .dot.c4{fill:var(--c4,#6b7280)}
.chart .t.c0,.chart .t.c1,.chart .t.c2,.chart .t.c3,.chart .t.c4{stroke:none;font-weight:600}
.chart .t.c0{fill:var(--c0,#2f6f5e)}.chart .t.c1{fill:var(--c1,#b0642a)}.chart .t.c2{fill:var(--c2,#4a5fa5)}
.chart .t.c3{fill:var(--c3,#8a4a7d)}.chart .t.c4{fill:var(--c4,#6b7280)}
.chart .hit{fill:transparent;stroke:none}
.chart .s-pass{fill:var(--pass,#2f7d4f);stroke:var(--pass,#2f7d4f)}
.chart .s-fail{fill:var(--fail,#b3261e);stroke:var(--fail,#b3261e)}
.chart .s-undecided{fill:var(--undecided,#9a6700);stroke:var(--undecided,#9a6700)}
.chart .s-not_applicable{fill:var(--na,#8a918c);stroke:var(--na,#8a918c)}
.chart .s-error{fill:var(--fail,#b3261e);stroke:var(--fail,#b3261e)}
.chart .mark>*{stroke-width:0}
.chart .mark>.stroke{stroke-width:2.6;stroke-linecap:round;fill:none}
.chart .mark>.hollow{stroke-width:1.8;stroke-linejoin:round;fill:var(--card,#fff)}
.chart .interval{stroke-width:2.2;stroke-linecap:round}
.chart .cell{fill:var(--heat,#b0642a)}
.chart .cell.neg{fill:var(--heat-neg,#4a5fa5)}
.chart .cell-back{fill:var(--well,#eef0ec)}
.chart .bar{fill:var(--c4,#6b7280);fill-opacity:.55}
.chart .bar.hot{fill:var(--fail,#b3261e);fill-opacity:.85}
.chart .bar-back{fill:var(--well,#eef0ec)}
""".strip()


def styled(*parts: Markup) -> str:
    """Parts after the style sheet, for a notebook, which has none of ours (charts would be black there)."""
    return str(Markup("<style>{}</style>").format(Markup(STYLE)) + Markup().join(parts))
