"""Constraints and their verdicts, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from glasshouse.draw import clean, esc, interval_strip, label, status_mark
from glasshouse.draw import table as html_table
from glasshouse.page.curves import allowed_range, interval_of
from glasshouse.page.cut import Cuts
from glasshouse.page.read import Gate, RunRecord, num, rows, table, words

STATUS_WORDS = {
    "pass": "pass",
    "fail": "fail",
    "undecided": "undecided",
    "not_applicable": "not applicable",
    "error": "error",
}


def badge(status: str) -> Markup:
    """A verdict as a coloured word with its shape; an unknown status is shown as the error it is."""
    kind = status if status in STATUS_WORDS else "error"
    icon = Markup('<svg class="chart icon" viewBox="0 0 14 14" aria-hidden="true">{}</svg>').format(
        status_mark(7, 7, kind, "", 4.5)
    )
    said = STATUS_WORDS.get(status) or f"error ({clean(status, 40)})"
    return Markup('<span class="badge {}">{}{}</span>').format(kind, icon, said)


def pairs(
    value: dict[str, Any], limit: int, skip: Sequence[str] = (), space: str = " "
) -> list[tuple[str, str]]:
    """Plain values of an object, one level flattened, as (name, text); `space` replaces underscores."""
    out: list[tuple[str, str]] = []
    for key, item in list(value.items())[:40]:
        if key in skip or item is None:
            continue
        if isinstance(item, dict):
            inner = [(f"{key} {k}", v) for k, v in list(item.items())[:20] if not isinstance(v, (dict, list))]
        elif isinstance(item, list):
            flat = [v for v in item[:8] if not isinstance(v, (dict, list))]
            more = f" and {len(item) - 8} more" if len(item) > 8 else ""
            inner = [(key, ", ".join(shown(v) for v in flat) + more)] if flat else []
        else:
            inner = [(key, item)]
        out += [(clean(k.replace("_", space), 80), clean(shown(v), limit)) for k, v in inner if v is not None]
    return out


def shown(value: object) -> str:
    """A plain value as a reader wants it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    known = num(value)
    if known is not None:
        return f"{value:,}" if isinstance(value, int) else label(known)
    return str(value)


def bound_text(verdict: dict[str, Any]) -> str:
    """The bound as a reader says it: ≤ 0.1."""
    bound = table(verdict.get("bound"))
    if (most := num(bound.get("at_most"))) is not None:
        return f"≤\u00a0{label(most)}"
    if (least := num(bound.get("at_least"))) is not None:
        return f"≥\u00a0{label(least)}"
    allowed = allowed_range(verdict)
    return f"{label(allowed[0])} to {label(allowed[1])}" if allowed else ""


def estimate_cell(verdict: dict[str, Any]) -> Markup:
    """Estimate, interval and bound in numbers, and the same as a small picture."""
    estimate, interval, allowed = num(verdict.get("estimate")), interval_of(verdict), allowed_range(verdict)
    if estimate is None:
        return esc("none") if verdict.get("status") != "not_applicable" else esc("")
    ends = f" [{label(interval[0])}, {label(interval[1])}]" if interval else ""
    numbers = f"{label(estimate)}{ends}"
    if allowed is None:
        return esc(numbers)
    seen = [estimate, *(interval or ()), *(b for b in allowed if abs(b) < 1e17)]
    lo, hi = min(seen), max(seen)
    span = (0.0, 1.0) if lo >= 0 and hi <= 1 else (lo - 0.1 * (hi - lo or 1), hi + 0.1 * (hi - lo or 1))
    if not all(math.isfinite(v) for v in (*span, span[1] - span[0])):
        return esc(numbers)
    title = f"{numbers}, allowed {bound_text(verdict)}"
    strip = interval_strip(estimate, interval, allowed, words(verdict.get("status")), title, span=span)
    return Markup(
        '<div class="strip">{}</div><span class="nums">{}</span> <span class="soft">{}</span>'
    ).format(strip, numbers, bound_text(verdict))


def percent(share: float) -> str:
    """A share as a percentage, rounded down: only all of it is ever 100%."""
    known = min(1.0, max(0.0, share))
    return f"{math.floor(known * 1000 + 1e-9) / 10:g}%"


def coverage_cell(verdict: dict[str, Any]) -> Markup:
    """Share covered, scope, and how many words were exempted."""
    coverage = table(verdict.get("coverage"))
    share = num(coverage.get("share"))
    parts = [] if share is None else [percent(share)]
    exempt = coverage.get("exempt")
    if isinstance(exempt, list) and exempt:
        parts.append(f"{len(exempt)} exempt")
    scope = clean(words(coverage.get("scope")), 160)
    head = ", ".join(parts)
    return Markup('{} <span class="soft">{}</span>').format(head, scope) if head or scope else esc("")


def side_check(value: object) -> Markup:
    """A control or a baseline in one cell: its own status first, then its numbers."""
    side = table(value)
    if not side:
        return esc("")
    status = words(side.get("status"))
    if not status and isinstance(side.get("ok"), bool):
        status = "pass" if side["ok"] else "fail"
    name = words(side.get("name")) or words(side.get("subject")) or words(side.get("kind"))
    estimate = num(side.get("estimate"))
    numbers = "" if estimate is None else label(estimate)
    if (interval := interval_of(side)) is not None:
        numbers += f" [{label(interval[0])}, {label(interval[1])}]"
    verdict = badge(status) if status else Markup()
    return Markup('{} {} <span class="soft">{}</span>').format(verdict, numbers, clean(name, 80))


def deciding(record: RunRecord) -> tuple[Gate | None, str]:
    """The gate whose verdicts the constraint table shows, and its name: promotion's, else the latest."""
    promoted = record.promoted()
    for gate in reversed(record.gates):
        if gate.action == "promote" or (promoted and gate.checkpoint == promoted[-1]):
            return gate, "at promotion"
    return (record.gates[-1], "at the latest gate") if record.gates else (None, "")


def declared(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The recipe's constraints by id."""
    listed = record.recipe.get("constraint") or record.recipe.get("constraints")
    if isinstance(listed, dict):
        listed = [{"id": name, **table(body)} for name, body in listed.items()]
    return {words(c.get("id")): c for c in rows(listed) if words(c.get("id"))}


def constraint_table(record: RunRecord, cuts: Cuts) -> tuple[Markup | None, str]:
    """The table of constraints and when its verdicts were given; None when there is nothing to list."""
    gate, when = deciding(record)
    known = declared(record)
    given = {words(v.get("constraint")): v for v in (gate.verdicts if gate else ())}
    body = []
    for name in cuts.first(list(dict.fromkeys([*known, *given])), cuts.limits.constraints, "Constraints"):
        verdict = given.get(name)
        claim = words((verdict or {}).get("claim")) or words(known.get(name, {}).get("claim"))
        kind = words((verdict or {}).get("kind")) or words(known.get(name, {}).get("kind"))
        title = Markup('<strong class="id">{}</strong> <span class="soft">{}</span><br>{}').format(
            clean(name, 120), clean(kind, 40), clean(claim, cuts.limits.text)
        )
        if verdict is None:
            body.append([title, Markup('<span class="soft">not checked here</span>'), *[""] * 6])
            continue
        reason = clean(words(verdict.get("reason")), 300)
        status = words(verdict.get("status"))
        judged = badge(status)
        if reason and status != "pass":
            judged += Markup('<br><span class="soft">{}</span>').format(reason)
        if verdict.get("spent") is True:
            judged += Markup('<br><span class="soft">spent: training used it, so a pass opens nothing</span>')
        alpha, n = num(verdict.get("alpha")), num(verdict.get("n"))
        body.append(
            [
                title,
                judged,
                estimate_cell(verdict),
                "" if n is None else f"{n:,.0f}",
                coverage_cell(verdict),
                "" if alpha is None else label(alpha),
                side_check(verdict.get("control")),
                side_check(verdict.get("baseline")),
            ]
        )
    if not body:
        return None, when
    head = [
        "Constraint",
        "Verdict",
        "Estimate and bound",
        "n",
        "Coverage",
        "Error level",
        "Control",
        "Output-only baseline",
    ]
    return html_table(head, body, f"Constraints {when}", numeric=(3, 5), cards=True), when
