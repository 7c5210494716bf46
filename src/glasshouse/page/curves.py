"""Curves over the whole run, rolled-back branches included, with the gate lane beneath them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from glasshouse.draw import Axes, Lane, Mark, Series, clean, label, line_chart
from glasshouse.page.read import RunRecord, num, words

WIDE, NARROW = (
    920,
    343,
)  # pixels; the page shows the one that fits, so that letters keep their size on a phone
_MOST_SETS, _MOST_LANES, _MOST_GATES = 4, 16, 400


def both_widths(chart: Callable[[int], Markup]) -> Markup:
    """A chart drawn twice, for wide and for narrow screens; the page's style shows one."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(chart(WIDE), chart(NARROW))


def rolled_back(record: RunRecord) -> list[tuple[float, float, str]]:
    """Spans of updates (from, to, label) whose weights were thrown away.

    `update` never goes back, so what a rollback undoes is exactly what lies between the checkpoint it went
    to and the one it judged. A rollback to no named checkpoint went to the start of its stage.
    """
    updates = record.updates()
    out = []
    for gate in record.gates:
        if gate.action != "rollback" or gate.update is None:
            continue
        start = updates.get(gate.to_checkpoint)
        if start is None:
            stage = [
                at
                for r in record.metrics
                if words(r.get("stage")) == gate.stage and (at := num(r.get("update")))
            ]
            start = min(stage, default=0.0)
        if start < gate.update:
            name = gate.to_checkpoint or "the start of the stage"
            out.append((start, gate.update, f"rolled back to {name}"))
    return out


def undone(record: RunRecord) -> list[tuple[float, float, str]]:
    """`rolled_back`, and what the trainer itself trained again because of a spike."""
    updates, out = record.updates(), rolled_back(record)
    for body in record.of("spike"):
        head = words(body.get("checkpoint"))
        start, end = updates.get(head), num(body.get("update"))
        if start is not None and end is not None and start < end:
            out.append((start, end, f"rewound to {head}"))
    return sorted(out)


def _pieces(
    points: Iterable[tuple[float, float, str]], spans: Sequence[tuple[float, float, str]]
) -> list[tuple[bool, list[tuple[float, float]]]]:
    """Points (update, value, stage) cut where the stage changes or a rolled-back span begins or ends."""
    out: list[tuple[bool, list[tuple[float, float]]]] = []
    last: tuple[str, int | None] | None = None
    for at, value, stage in sorted(points, key=lambda p: p[0]):
        span = next((i for i, (lo, hi, _) in enumerate(spans) if lo < at <= hi), None)
        if (stage, span) != last:
            out.append((span is not None, []))
            last = (stage, span)
        out[-1][1].append((at, value))
    return out


def pieces_of(
    name: str,
    points: list[tuple[float, float, str]],
    spans: Sequence[tuple[float, float, str]],
    color: int,
    style: str,
) -> list[Series]:
    """One curve in pieces; its last kept piece carries the name.

    With marks (``style`` "both") an undone piece begins at the checkpoint that the run went back to: the few
    points measured there would else stand without a line.
    """
    pieces = _pieces(points, spans)
    if style == "both":
        starts = {lo for lo, _, _ in spans}
        for (_, before), (gone, piece) in pairwise(pieces):
            if gone and before[-1][0] in starts:
                piece.insert(0, before[-1])
    kept = [i for i, (gone, _) in enumerate(pieces) if not gone]
    named = kept[-1] if kept else len(pieces) - 1
    return [
        Series(name, p, color, style, faint=gone, labelled=i == named) for i, (gone, p) in enumerate(pieces)
    ]


def _stage_rules(record: RunRecord) -> list[tuple[float, str]]:
    """Where each stage begins, by the first metrics row that names it."""
    out: list[tuple[float, str]] = []
    seen: set[str] = set()
    for row in record.metrics:
        stage, at = words(row.get("stage")), num(row.get("update"))
        if stage and stage not in seen and at is not None:
            seen.add(stage)
            out.append((at, stage))
    return out[:8]


def verdict_text(verdict: dict[str, Any]) -> str:
    """One line: status, estimate and interval."""
    parts = [words(verdict.get("status")).replace("_", " ") or "error"]
    if (estimate := num(verdict.get("estimate"))) is not None:
        parts.append(label(estimate))
    if (interval := interval_of(verdict)) is not None:
        parts.append(f"[{label(interval[0])}, {label(interval[1])}]")
    return " ".join(parts)


def interval_of(verdict: dict[str, Any]) -> tuple[float, float] | None:
    """The verdict's interval when both ends are numbers."""
    ends = verdict.get("interval")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    lo, hi = num(ends[0]), num(ends[1])
    return None if lo is None or hi is None else (lo, hi)


def allowed_range(verdict: dict[str, Any]) -> tuple[float, float] | None:
    """The range the bound allows, open ends at plus or minus 1e18; None when there is no bound."""
    bound = verdict.get("bound")
    if not isinstance(bound, dict):
        return None
    lo, hi = num(bound.get("at_least")), num(bound.get("at_most"))
    between = bound.get("between")
    if isinstance(between, list) and len(between) == 2:
        lo, hi = num(between[0]), num(between[1])
    if lo is None and hi is None:
        return None
    return (-1e18 if lo is None else lo, 1e18 if hi is None else hi)


def by_constraint(record: RunRecord) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Constraint id to its verdicts as (update, verdict), in the order in which constraints first spoke."""
    out: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for gate in record.gates[-_MOST_GATES:]:
        for verdict in gate.verdicts:
            if gate.update is not None:
                out.setdefault(words(verdict.get("constraint")) or "(unnamed)", []).append(
                    (gate.update, verdict)
                )
    return out


def lanes(record: RunRecord) -> list[Lane]:
    """The gate lane: one row a constraint, and a first row for what the gate decided."""
    acted = {"continue": "pass", "promote": "pass", "hold": "undecided"}
    gates = [g for g in record.gates[-_MOST_GATES:] if g.update is not None]
    decided = [
        Mark(g.update or 0.0, acted.get(g.action, "fail"), f"gate {g.index}: {g.action}. {g.reason[:160]}")
        for g in gates
        if g.action
    ]
    out = [Lane("gate decision", decided)] if decided else []
    for name, verdicts in list(by_constraint(record).items())[:_MOST_LANES]:
        out.append(
            Lane(name, [Mark(at, words(v.get("status")), f"{name}: {verdict_text(v)}") for at, v in verdicts])
        )
    return out


def training_chart(record: RunRecord) -> Markup | None:
    """Bits per byte (else loss) over updates, with the gate lane; None without any row."""
    train = [r for r in record.metrics if r["kind"] == "train"]
    val = [r for r in record.metrics if r["kind"] == "val"]
    key = "bpb" if any(num(r.get("bpb")) is not None for r in train + val) else "loss"
    spans = undone(record)

    def points(some: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
        return [
            (float(r["update"]), v, words(r.get("stage"))) for r in some if (v := num(r.get(key))) is not None
        ]

    series = pieces_of("training", points(train), spans, 4, "thin")
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in val:
        sets.setdefault(words(row.get("set")) or "validation", []).append(row)
    for i, (name, some) in enumerate(list(sets.items())[:_MOST_SETS]):
        series += pieces_of(name, points(some), spans, i, "both")
    gate_lanes = lanes(record)
    if not any(s.points for s in series) and not gate_lanes:
        return None
    values = [y for s in series for _, y in s.points if y > 0]
    unit = "bits per byte" if key == "bpb" else "loss (nats per token)"
    axes = Axes(
        "updates",
        unit,
        log=bool(values) and max(values) / min(values) > 6,
        spans=spans,
        rules=_stage_rules(record),
        lanes=gate_lanes,
    )
    desc = describe(series, unit, spans)
    return both_widths(
        lambda w: line_chart(
            series, f"{unit} over updates", desc, axes, width=w, height=260 if w == WIDE else 200
        )
    )


def describe(series: Sequence[Series], unit: str, spans: Sequence[tuple[float, float, str]]) -> str:
    """For a reader who does not see the chart: where each curve begins and ends, what was undone."""
    ends: dict[str, list[float]] = {}
    for one in series:
        if not one.faint:
            ends.setdefault(one.name, []).extend(y for _, y in one.points)
    said = [f"{name}: from {label(v[0])} to {label(v[-1])} {unit}" for name, v in ends.items() if v]
    said += [f"updates {label(a)} to {label(b)} were {name}" for a, b, name in spans]
    return "; ".join(said) + "."


def _extent(record: RunRecord) -> tuple[float, float]:
    """First and last update of the run, so that small charts beside each other share one axis."""
    at = [float(r["update"]) for r in record.metrics] + [
        g.update for g in record.gates if g.update is not None
    ]
    return (min(at, default=0.0), max(at, default=1.0))


def constraint_charts(record: RunRecord) -> list[tuple[str, Markup]]:
    """Per constraint with at least two estimates: estimate and interval over updates against the bound."""
    out = []
    spans = undone(record)
    whole = _extent(record)
    for name, verdicts in list(by_constraint(record).items())[:_MOST_LANES]:
        known = [(at, e, v) for at, v in verdicts if (e := num(v.get("estimate"))) is not None]
        if len(known) < 2:
            continue
        bars = [(at, *i) for at, _, v in known if (i := interval_of(v)) is not None]
        allowed = allowed_range(known[-1][2])
        bounds = [(b, f"bound {label(b)}") for b in allowed or () if abs(b) < 1e17]
        every = [e for _, e, _ in known] + [x for b in bars for x in b[1:]] + [b for b, _ in bounds]
        unit = (-0.02, 1.02) if all(0.0 <= e <= 1.0 for e in every) else None
        series = [
            Series(
                name,
                [(at, e) for at, e, _ in known],
                4,
                "dots",
                labelled=False,
                intervals=bars,
                statuses=[words(v.get("status")) for _, _, v in known],
            )
        ]
        statistic = words(known[-1][2].get("statistic")) or "estimate"
        axes = Axes("updates", statistic, bounds=bounds, x_range=whole, y_range=unit, spans=spans)
        desc = f"{name}: " + "; ".join(f"update {label(at)}: {verdict_text(v)}" for at, _, v in known[-12:])
        out.append(
            (
                clean(name, 120),
                line_chart(
                    series, f"{name}: {statistic} over updates", desc, axes, width=NARROW + 17, height=130
                ),
            )
        )
    return out


def other_curves(record: RunRecord) -> list[tuple[str, Markup]]:
    """Learning rate, gradient norm and speed: small charts for whoever wants to see how the training went."""
    train = [r for r in record.metrics if r["kind"] == "train"]
    spans = undone(record)
    out = []
    for key, name in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s", "tokens per second"),
    ):
        points = [
            (float(r["update"]), v, words(r.get("stage")))
            for r in train
            if (v := num(r.get(key))) is not None
        ]
        if len(points) < 2:
            continue
        series = pieces_of("", points, spans, 0, "line")
        axes = Axes("updates", name, spans=spans)
        out.append(
            (
                clean(name, 120),
                line_chart(
                    series,
                    f"{name} over updates",
                    describe(series, name, spans),
                    axes,
                    width=NARROW + 17,
                    height=110,
                ),
            )
        )
    return out
