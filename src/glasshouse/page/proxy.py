"""RL's reward against what it stands for, both over the distance gone, with the over-optimisation curve.

The rows are those that the watch reads (`base.rlrows`), and the curve is fitted to them here as it was there.
"""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from glasshouse.base.errors import DataError
from glasshouse.base.overopt import Curve, fit
from glasshouse.base.rlrows import KIND, TOLD, Measured, drifts, live, measurements, source
from glasshouse.draw import Axes, Series, label, line_chart
from glasshouse.draw import table as html_table
from glasshouse.page.read import RunRecord, num

LARGEST = 1e60  # coefficients whose squares no float can hold are of no curve
NAMES = {"gold": "gold", "held_out": "held-out judge"}
MEANING = {
    "length": "tokens an answer",
    "repetition": "share of repeated word pairs",
    "evasive": "share of evasive answers",
    "entropy": "entropy of a prediction (nats)",
    "disagreement": "disagreement of the reward models",
    "outlier": "distance of the residuals from the reference's (its own: 1)",
    "unended": "share of answers cut by the limit",
    "kl_speed": "nats of KL an update",
}


def proxy_charts(record: RunRecord) -> list[Markup]:
    """The score and the reward over distance. Empty where no RL was measured by anything but its reward."""
    rows = live([r for r in record.metrics if r["kind"] == KIND])
    found, name = measurements(rows), source(rows)
    if name is None or len(found) < 2:
        return []
    flagged = next((m.d for m, r in _matched(found, rows) if r.get("flagged") == 1), None)
    curve = _fitted(found)
    rules = [] if flagged is None else [(flagged, "flagged")]
    if curve is not None and curve.peak is not None and curve.peak.d <= 1.5 * curve.reach:
        rules.append((curve.peak.d, "foretold peak"))
    points = sorted((m.d, m.gold, m.se) for m in found)
    series = [
        Series(
            NAMES[name],
            [(d, g) for d, g, _ in points],
            0,
            "dots",
            intervals=[(d, g - 2 * se, g + 2 * se) for d, g, se in points],
        )
    ]
    if curve is not None:
        at = np.linspace(points[0][0], points[-1][0], 80).tolist()
        with np.errstate(all="ignore"):
            series.append(Series("fitted curve", [(d, curve.at(d)[0]) for d in at], 1))
    out = [_drawn(series, NAMES[name], rules)]
    proxy = sorted((m.d, m.proxy) for m in found if m.proxy is not None)
    if len(proxy) > 1:
        out.append(_drawn([Series("reward", proxy, 2)], "reward that is trained on", rules))
    return out


def drift_table(record: RunRecord) -> Markup | None:
    """What drifted while RL went on: first fifth of the rows against the last. Nothing is decided on it."""
    with np.errstate(all="ignore"):
        found = drifts(live([r for r in record.metrics if r["kind"] == KIND]))
    body = [
        (MEANING[name], label(d.first), label(d.last), f"{d.z:+.1f}")
        for name in TOLD
        if (d := found.get(name)) is not None
    ]
    return html_table(["", "At first", "At last", "z"], body, "Drift", numeric=(1, 2, 3)) if body else None


def _drawn(series: list[Series], name: str, rules: list[tuple[float, str]]) -> Markup:
    ends = [one.points[-1] for one in series if one.points]
    told = "; ".join(f"{s.name} ends at {label(y)}" for s, (_, y) in zip(series, ends, strict=False))
    axes = Axes("distance from the start, root of nats", name, rules=rules)
    return line_chart(
        series, f"{name} over the distance of the policy from its start", told, axes, height=170
    )


def _fitted(found: list[Measured]) -> Curve | None:
    try:
        with np.errstate(all="ignore"):  # a file may hold any number
            curve = fit([m.d for m in found], [m.gold for m in found], [m.se for m in found])
    except (DataError, np.linalg.LinAlgError):  # too few or too alike, or numbers without sense
        return None
    sizes = np.abs(np.concatenate([curve.coefficients, curve.covariance.ravel()]))
    return curve if bool((sizes < LARGEST).all()) else None


def _matched(
    found: list[Measured], rows: list[dict[str, object]]
) -> list[tuple[Measured, dict[str, object]]]:
    """Measurements with the rows that carry their distance."""
    by = {round(d, 9): r for r in rows if (d := num(r.get("d"))) is not None and math.isfinite(d)}
    return [(m, by[round(m.d, 9)]) for m in found if round(m.d, 9) in by]
