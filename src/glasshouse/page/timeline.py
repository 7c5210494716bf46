"""One timeline: what was learned, what was decided, and when each watched concept appeared inside."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from glasshouse.draw import Axes, Lane, Mark, Series, clean, esc, label, line_chart
from glasshouse.draw import table as html_table
from glasshouse.page.curves import (
    WIDE,
    both_widths,
    by_constraint,
    describe,
    lanes,
    pieces_of,
    undone,
)
from glasshouse.page.cut import Cuts
from glasshouse.page.read import RunRecord, num, rows, table, words

_MOST_CONCEPTS, _MOST_BEHAVIOURS = 4, 3
CAUSES = ("trigger", "feature")  # kinds of concept that a failed check named


def concepts(record: RunRecord) -> list[dict[str, Any]]:
    """The watched concepts with at least one row."""
    return [c for c in rows(record.lineage.get("concepts")) if rows(c.get("rows"))]


def concept_name(concept: dict[str, Any]) -> str:
    """How the page calls it."""
    kind, name = words(concept.get("kind")), clean(words(concept.get("name")), 40)
    return f"{kind} \u201c{name}\u201d" if kind in CAUSES else name


def timeline(record: RunRecord) -> Markup | None:
    """Loss, behaviour and concepts above each other on one axis; None without any concept."""
    found = concepts(record)[:_MOST_CONCEPTS]
    if not found:
        return None
    spans, extent = undone(record), _extent(record)
    panels = [
        (_loss(record, spans), "bits per byte", None),
        (_behaviour(record, spans), "behaviour (share)", (-0.02, 1.02)),
        (_strength(found, spans), "strength inside", (-0.02, 1.02)),
    ]
    shown = [p for p in panels if any(s.points for s in p[0])]
    marks = _appearances(found)

    def chart(width: int) -> Markup:
        out = Markup()
        for i, (series, unit, span) in enumerate(shown):
            last = i == len(shown) - 1
            axes = Axes(
                "updates" if last else "",
                unit,
                spans=spans,
                x_range=extent,
                y_range=span,
                lanes=[*marks, *lanes(record)[:1]] if last else (),
            )
            title = f"{unit} over updates"
            out += line_chart(
                series,
                title,
                describe(series, unit, spans),
                axes,
                width=width,
                height=130 if width == WIDE else 120,
            )
        return out

    return both_widths(chart)


def _extent(record: RunRecord) -> tuple[float, float]:
    at = [float(r["update"]) for r in record.metrics]
    at += [
        v for c in concepts(record) for r in rows(c.get("rows")) if (v := num(r.get("update"))) is not None
    ]
    return min(at, default=0.0), max(at, default=1.0)


def _loss(record: RunRecord, spans: list[tuple[float, float, str]]) -> list[Series]:
    points = [
        (float(r["update"]), v, words(r.get("stage")))
        for r in record.metrics
        if r["kind"] == "train" and (v := num(r.get("bpb"))) is not None
    ]
    return pieces_of("training", points, spans, 4, "thin")


def _behaviour(record: RunRecord, spans: list[tuple[float, float, str]]) -> list[Series]:
    """Estimates of the behaviour constraints, as they were judged."""
    out: list[Series] = []
    asked = [
        (name, judged)
        for name, judged in by_constraint(record).items()
        if judged and words(judged[0][1].get("kind")) == "behaviour"
    ]
    for i, (name, judged) in enumerate(asked[:_MOST_BEHAVIOURS]):
        points = [(at, e, "") for at, v in judged if (e := num(v.get("estimate"))) is not None]
        out += pieces_of(clean(name, 40), points, spans, i, "both")
    return out


def _strength(found: list[dict[str, Any]], spans: list[tuple[float, float, str]]) -> list[Series]:
    out: list[Series] = []
    for i, concept in enumerate(found):
        points = [
            (at, v, "")
            for r in rows(concept.get("rows"))
            if (v := num(r.get("strength"))) is not None and (at := num(r.get("update"))) is not None
        ]
        out += pieces_of(concept_name(concept), points, spans, i, "both")
    return out


def _appearances(found: list[dict[str, Any]]) -> list[Lane]:
    """A lane for each concept: where it was first there."""
    out = []
    for concept in found:
        at = num(table(concept.get("appeared")).get("update"))
        status = "fail" if words(concept.get("kind")) in CAUSES else "pass"
        name = concept_name(concept)
        marks = [] if at is None else [Mark(at, status, f"{name} appeared at update {label(at)}")]
        out.append(Lane(name, marks))
    return out


def lineage_tables(record: RunRecord, cuts: Cuts) -> list[tuple[str, str, Markup]]:
    """(name, a sentence, table) of every concept: checkpoint by checkpoint, what carries it."""
    out = []
    for concept in cuts.first(concepts(record), _MOST_CONCEPTS * 2, "Concepts"):
        body = [_row(r) for r in cuts.first(rows(concept.get("rows")), 40, "Checkpoints of a concept")]
        head = [
            "Checkpoint",
            "Update",
            "Strength",
            "Behaviour",
            "Like the gate before",
            "Carried by",
            "Decision",
        ]
        made = html_table(head, body, "From gate to gate", numeric=(1, 2, 3, 4))
        out.append((concept_name(concept), _sentence(concept), made))
    return out


def _row(row: dict[str, Any]) -> list[Markup | str]:
    def shown(key: str) -> str:
        value = num(row.get(key))
        return "" if value is None else label(value)

    carried = [
        f"{clean(words(c.get('name')), 40)} {label(e)}"
        for c in rows(row.get("components"))[:2]
        if (e := num(c.get("effect"))) is not None
    ]
    return [
        Markup("<span class=id>{}</span>").format(clean(words(row.get("checkpoint")), 60)),
        *(shown(k) for k in ("update", "strength", "behaviour", "like_before")),
        esc("; ".join(carried), 120),
        esc(words(row.get("action")), 40),
    ]


def _sentence(concept: dict[str, Any]) -> str:
    """When it appeared and which data raised it."""
    appeared = table(concept.get("appeared"))
    at = num(appeared.get("update"))
    if at is None:
        return "It never appeared."
    said = f"First there at update {label(at)}, in stage {clean(words(appeared.get('stage')), 60)}."
    raised = rows(concept.get("raised_by"))
    names = ", ".join(clean(words(r.get("shard")), 40) for r in raised)
    return f"{said} Raised most by {names}." if names else said
