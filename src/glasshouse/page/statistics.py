"""All constraints' evidence side by side: e-values, what may be reported as broken, detectors over gates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from glasshouse.base.evalue import e_bh
from glasshouse.draw import clean, esc, label
from glasshouse.draw import table as html_table
from glasshouse.page.cut import Cuts
from glasshouse.page.read import Gate, RunRecord, num, table, words
from glasshouse.page.verdicts import badge, deciding

DEFAULT_RATE = 0.05  # of a run whose recipe names no `false_discoveries`


@dataclass(frozen=True)
class Evidence:
    """What the section shows: one sentence, the table, and when the verdicts were given."""

    said: str
    rows: Markup
    when: str


def evidence(record: RunRecord, cuts: Cuts) -> Evidence | None:
    """E-values of the gate that the constraint table shows, and the detectors' states; None without any."""
    gate, when = deciding(record)
    if gate is None:
        return None
    known = e_values(gate)
    watching = {name: state for name, state in detectors(record).items() if state}
    if not known and not watching:
        return None
    level = num(table(record.recipe.get("gate")).get("false_discoveries"))
    level = level if level is not None and 0 < level < 1 else DEFAULT_RATE
    rejected = e_bh(known, level)
    given = {words(v.get("constraint")): v for v in gate.verdicts}
    names = [n for n in given if n in known or n in watching]
    body = []
    for name in cuts.first(names, cuts.limits.constraints, "E-values"):
        verdict = given[name]
        body.append(
            [
                Markup('<strong class="id">{}</strong>').format(clean(name, 120)),
                badge(words(verdict.get("status"))),
                number(known.get(name)),
                number(num(verdict.get("e_pass"))),
                Markup('<span class="badge fail">reported</span>') if name in rejected else "",
                esc(detector_text(watching.get(name, {}))),
            ]
        )
    head = [
        "Constraint",
        "Verdict",
        "e-value: broken",
        "e-value: kept",
        f"e-BH at {label(100 * level)}%",
        "Over the gates",
    ]
    said = (
        f"Broken by e-BH over all e-values of this gate: {len(rejected)} of {len(known)}. Of those reported, "
        f"at most {label(100 * level)}% are expected to be wrong, however the checks depend on each other."
    )
    return Evidence(
        said, html_table(head, body, "Evidence of all constraints", numeric=(2, 3), cards=True), when
    )


def e_values(gate: Gate) -> dict[str, float]:
    """Constraint -> e-value against its being kept, of verdicts that measured something."""
    out = {}
    for verdict in gate.verdicts:
        e, name = num(verdict.get("e_fail")), words(verdict.get("constraint"))
        if (
            name
            and e is not None
            and e >= 0
            and words(verdict.get("status")) in ("pass", "fail", "undecided")
        ):
            out[name] = e
    return out


def detectors(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Constraint -> the state of its detector at the latest gate that tells."""
    out: dict[str, dict[str, Any]] = {}
    for gate in record.gates:
        for verdict in gate.verdicts:
            state = table(table(verdict.get("memory")).get("detector"))
            if state:
                out[words(verdict.get("constraint"))] = state
    return out


def detector_text(state: dict[str, Any]) -> str:
    """A detector's state in words: 0.12 of an alarm from 7 gates; alarms at gates 3, 9."""
    value, gates = num(state.get("value")), num(state.get("gates"))
    parts = []
    if value is not None and value >= 0 and gates:
        share = "less than 0.001" if value < 0.001 else label(value)
        parts.append(f"{share} of an alarm, from {gates:,.0f} gate{'' if gates == 1 else 's'}")
    listed = state.get("alarms")
    alarms = [f"{a:.0f}" for g in listed if (a := num(g)) is not None] if isinstance(listed, list) else []
    if alarms:
        more = f" and {len(alarms) - 8} more" if len(alarms) > 8 else ""
        parts.append(f"alarm at gate{'' if len(alarms) == 1 else 's'} {', '.join(alarms[:8])}{more}")
    return "; ".join(parts)


def number(value: float | None) -> str:
    """An e-value as people write it; very large and very small ones by their power of ten."""
    if value is None:
        return ""
    if value == 0 or 0.001 <= value < 1e5:
        return label(float(f"{value:.3g}"))
    return f"10^{math.floor(math.log10(value))}" if value > 0 else ""
