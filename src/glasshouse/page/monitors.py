"""Inside the model over the run: activations, updates, gradient noise; spikes and what was done."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from glasshouse.draw import Axes, clean, label, line_chart
from glasshouse.draw import table as html_table
from glasshouse.page.curves import NARROW, describe, pieces_of, undone
from glasshouse.page.cut import Cuts
from glasshouse.page.read import RunRecord, num, words

# key in a row of metrics.jsonl, name, whether its axis counts factors
BY_LAYER = (
    ("update_ratio", "update over weight (rms)", True),
    ("resid_rms", "residual stream (rms)", True),
    ("attn_entropy", "attention entropy (share of even)", False),
    ("attn_logit_max", "largest attention logit", True),
    ("dead_units", "silent MLP units (share)", False),
)
OF_MODEL = (
    ("logit_max", "largest output logit", True),
    ("log_z", "log normaliser (rms)", False),
)
_SHOWN_LAYERS = 5  # as many as there are colours
_SMOOTHED = 10  # looks whose gradient noise is averaged: one alone says little
ACTIONS = {"apply": "applied", "skip": "skipped", "rewind": "rewound", "stop": "stopped for a person"}


def shown_layers(n: int) -> list[int]:
    """First, last, and evenly between, at most `_SHOWN_LAYERS`."""
    if n <= _SHOWN_LAYERS:
        return list(range(n))
    return [round(i * (n - 1) / (_SHOWN_LAYERS - 1)) for i in range(_SHOWN_LAYERS)]


def monitor_charts(record: RunRecord) -> list[tuple[str, Markup]]:
    """Small charts of what monitors saw, one curve a layer; empty where no run was watched twice."""
    looks = [r for r in record.metrics if r["kind"] == "monitor"]
    if len(looks) < 2:
        return []
    out = []
    for key, name, log in BY_LAYER:
        depth = max((len(r[key]) for r in looks if isinstance(r.get(key), list)), default=0)
        curves = {f"layer {i}": [(r, _entry(r.get(key), i)) for r in looks] for i in shown_layers(depth)}
        out.append(_chart(record, name, curves, log))
    for key, name, log in OF_MODEL:
        out.append(_chart(record, name, {"": [(r, num(r.get(key))) for r in looks]}, log))
    out.append(_chart(record, "gradient noise scale (rows)", {"": noise_scale(looks)}, True))
    return [(name, chart) for name, chart in out if chart is not None]


def noise_scale(looks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None]]:
    """Noise over signal, each averaged over a stage's last looks: their ratio at one look is mostly noise."""
    out: list[tuple[dict[str, Any], float | None]] = []
    for i, row in enumerate(looks):
        recent = [r for r in looks[max(0, i + 1 - _SMOOTHED) : i + 1] if r.get("stage") == row.get("stage")]
        known = [
            (t, s)
            for r in recent
            if (t := num(r.get("noise_trace"))) is not None and (s := num(r.get("noise_signal"))) is not None
        ]
        trace, signal = sum(t for t, _ in known), sum(s for _, s in known)
        out.append((row, trace / signal if trace > 0 and signal > 0 else None))
    return out


def _entry(values: object, i: int) -> float | None:
    return num(values[i]) if isinstance(values, list) and i < len(values) else None


def _chart(
    record: RunRecord, name: str, curves: dict[str, list[tuple[dict[str, Any], float | None]]], log: bool
) -> tuple[str, Markup | None]:
    spans, series, known = undone(record), [], 0
    for color, (curve, values) in enumerate(curves.items()):
        points = [(float(r["update"]), v, words(r.get("stage"))) for r, v in values if v is not None]
        known = max(known, len(points))
        series += pieces_of(curve, points, spans, color, "line")
    if known < 2:
        return name, None
    above = [y for s in series for _, y in s.points if y > 0]
    axes = Axes("updates", name, log=log and bool(above) and max(above) / min(above) > 6, spans=spans)
    title = f"{name} over updates"
    return name, line_chart(series, title, describe(series, name, spans), axes, width=NARROW + 17, height=120)


def spike_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Every spike: when, what, how far above the usual, on which shards, and what was done about it."""
    spikes = [r for r in record.metrics if r["kind"] == "spike"]
    body = [
        (
            clean(words(r.get("stage")), 60),
            words(r.get("step")),
            clean(words(r.get("what")), 120),
            label(v) if (v := num(r.get("value"))) is not None else clean(words(r.get("value")), 20),
            label(v) if (v := num(r.get("limit"))) is not None else "",
            ACTIONS.get(words(r.get("action")), clean(words(r.get("action")), 20)),
            clean(", ".join(words(s) for s in r["shards"]) if isinstance(r.get("shards"), list) else "", 160),
        )
        for r in cuts.first(spikes, cuts.limits.items, "Spikes")
    ]
    head = ["Stage", "Step", "What", "Value", "Usual up to", "The update was", "Shards"]
    return html_table(head, body, "Spikes", numeric=(1, 3, 4), cards=True) if body else None
