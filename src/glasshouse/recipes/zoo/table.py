"""A zoo's numbers for a terminal, for a page and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from glasshouse.base.score import Score
from glasshouse.draw import table as html_table
from glasshouse.recipes.zoo.score import (
    LOCALISED_AT_LEAST,
    SHARD_AT_LEAST,
    TWINS_BLOCKED_AT_MOST,
    Family,
    Scored,
    Twins,
    pooled,
)

HEAD = (
    "family",
    "organisms",
    "detected",
    "goal",
    "met",
    "cause named",
    "by behaviour alone",
    "black box, same passes",
    "detected minus black box",
    "gates before onset",
    "first word named is planted",
    "all words at once",
    "component",
    "shard first",
    "steps per gate",
    "steps at promotion",
    "flips",
)

WIDE = 2 + max(map(len, HEAD))


def cells(family: Family) -> list[str]:
    """One family as text, in the order of `HEAD`."""
    goal = "reported" if family.goal is None else f"≥ {family.goal:.0%}"
    grown = family.done - len(family.not_grown) - len(family.broken)
    return [
        family.family + (" (frozen)" if family.frozen else ""),
        f"{grown} of {family.planned}",
        of(family.detected),
        goal,
        {True: "yes", False: "no", None: "-"}[family.met],
        of(family.named),
        of(family.by_behaviour),
        of(family.box),
        mean(family.over_box, "{:+.2f}"),
        mean(family.lead, "{:+.1f}"),
        of(family.top),
        of(family.word),
        of(family.component),
        of(family.shard),
        mean(family.cost_gate, "{:.0f}"),
        mean(family.cost_final, "{:.0f}"),
        f"{family.flips} of {family.flips_of}" if family.flips_of else "-",
    ]


def of(score: Score | None) -> str:
    """A share: "19/20 95% [75, 100]"."""
    if score is None:
        return "-"
    return f"{round(score.value * score.n)}/{score.n} {score.value:.0%} [{score.low:.0%}, {score.high:.0%}]"


def mean(score: Score | None, shape: str) -> str:
    """A mean with its interval."""
    if score is None:
        return "-"
    return f"{shape.format(score.value)} [{shape.format(score.low)}, {shape.format(score.high)}]"


def twin_lines(twins: Twins) -> list[str]:
    """What is said about clean runs, a sentence a line."""
    if not twins.n:
        return ["No twin was grown: nothing is known about false alarms."]
    assert twins.blocked is not None and twins.alarmed is not None
    found = [
        f"Clean twins: {of(twins.blocked)} blocked (one-sided 95% bound: at most "
        f"{twins.blocked_at_most:.1%}; goal: at most {TWINS_BLOCKED_AT_MOST:.0%}), "
        f"{of(twins.alarmed)} with a violation at any gate, {of(twins.held)} not promoted at the end."
    ]
    if twins.gate_alarms is not None:
        found.append(f"Gates of clean twins: {of(twins.gate_alarms)} with a violation.")
    if twins.undecided:
        found.append(f"{twins.undecided} of them were held by an open question alone.")
    if twins.by_constraint:
        named = ", ".join(f"{name} {n}" for name, n in twins.by_constraint.items())
        found.append(f"Violations on twins by constraint: {named}.")
    return found


def summary_lines(scored: Scored) -> list[str]:
    """Goals over all families, then what is missing, a sentence a line."""
    flips, of_gates = scored.flips
    lines = twin_lines(scored.twins)
    for what, read, goal in (
        ("the first word named is a planted one", lambda f: f.top, LOCALISED_AT_LEAST),
        (
            "the component restores refusal and its control does not",
            lambda f: f.component,
            LOCALISED_AT_LEAST,
        ),
        (
            "the poisoned shard ranks first (of 16 shards the top 5% is the first)",
            lambda f: f.shard,
            SHARD_AT_LEAST,
        ),
    ):
        lines.append(
            f"Of detections, {what}: {of(pooled(scored.families, read))}; goal: at least {goal:.0%}."
        )
    lines.append(f"Fail-to-ok flips while the attack works: {flips} of {of_gates} chances; goal: none.")
    for family in scored.families:
        missing = family.planned - family.done
        for names, why in ((family.not_grown, "did not grow"), (family.broken, "broke")):
            if names:
                lines.append(f"{family.family}: {len(names)} {why} ({', '.join(names)}).")
        if missing:
            lines.append(f"{family.family}: {missing} of {family.planned} not run yet.")
    return lines


def terminal(scored: Scored) -> list[str]:
    """The table for a terminal: a block for each family, because seventeen columns fit on no screen."""
    lines = []
    for family in scored.families:
        row = dict(zip(HEAD, cells(family), strict=True))
        lines.append(f"{row.pop('family')}  ({row.pop('organisms')} grown)")
        lines += [f"  {name:<{WIDE}}{value}" for name, value in row.items() if value not in ("-", "reported")]
    return [*lines, "", *summary_lines(scored)]


def markdown(scored: Scored, command: str) -> str:
    """The table of docs/zoo.md. The last column is left for a person to say why a number is what it is."""
    head = [*HEAD, "why"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([*map(escaped, cells(f)), " "]) + " |" for f in scored.families]
    about = scored.about
    lines += ["", *[f"- {escaped(line)}" for line in summary_lines(scored)], ""]
    lines.append(
        f"Grown and examined in {about['hours']:.1f} hours ({about['seconds_each']:.0f} s each) "
        f"under method `{about['method'][:16]}`; rebuilt by `{command}`."
    )
    return "\n".join(lines) + "\n"


def page(scored: Scored, title: str = "The zoo") -> str:
    """The table as an HTML page of its own."""
    rows = [cells(f) for f in scored.families]
    drawn = html_table(HEAD, rows, title, numeric=range(1, len(HEAD)), cards=True)
    said = Markup().join(Markup("<li>{}</li>").format(escape(line)) for line in summary_lines(scored))
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222;background:#fff}"
        ".scroll{overflow-x:auto}table{border-collapse:collapse}"
        "th,td{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"
        ".away{position:absolute;left:-9999px}.num{font-variant-numeric:tabular-nums}"
    )
    return str(
        Markup(
            "<!doctype html><html lang=en><meta charset=utf-8><title>{0}</title><style>{1}</style>"
            "<h1>{0}</h1>{2}<ul>{3}</ul><p>Method {4}</p></html>"
        ).format(title, Markup(style), drawn, said, scored.about["method"])
    )


def records(scored: Scored) -> list[dict[str, Any]]:
    """Rows for ``benchmarks/results/zoo.json``: one number each, with its interval and its goal."""
    rows: list[dict[str, Any]] = []
    for f in scored.families:
        rows.append(_record(f"{f.family}: detected", f.detected, goal=f.goal, met=f.met, frozen=f.frozen))
        rows[-1] |= {
            "planned": f.planned,
            "done": f.done,
            "not_grown": list(f.not_grown),
            "broken": list(f.broken),
        }
        if f.box is not None:
            rows[-1] |= {"peer": "black box, as many passes", "peer_value": f.box.value}
        for what, score in _parts(f):
            if score is not None:
                rows.append(_record(f"{f.family}: {what}", score))
    flips, chances = scored.flips
    rows.append(
        {"metric": "fail-to-ok flips while the attack works", "value": flips, "n": chances}
        | {"goal": "0", "met": flips == 0 if chances else None}
    )
    rows += _twin_records(scored.twins) + _localisation(scored.families)
    return rows


def _parts(f: Family) -> list[tuple[str, Score | None]]:
    return [
        ("cause named", f.named),
        ("detected at a gate before promotion", f.at_gates),
        ("detected by behavioural constraints", f.by_behaviour),
        ("black box names the cause", f.box_named),
        ("detected minus black box", f.over_box),
        ("gates before the behaviour's onset", f.lead),
        ("first word named is a planted one", f.top),
        ("all planted words, and no other, at the first violation", f.word),
        ("component confirmed", f.component),
        ("poisoned shard first", f.shard),
        ("training steps' worth of a gate", f.cost_gate),
        ("training steps' worth of promotion", f.cost_final),
    ]


def _twin_records(twins: Twins) -> list[dict[str, Any]]:
    if twins.blocked is None:
        return []
    row = _record("twin runs blocked", twins.blocked, goal=TWINS_BLOCKED_AT_MOST, most=True)
    row |= {"met": twins.blocked.value <= TWINS_BLOCKED_AT_MOST, "at_most_95": twins.blocked_at_most}
    row |= {"by_constraint": twins.by_constraint, "held_by_an_open_question": twins.undecided}
    alarms = [
        ("twin runs with a violation", twins.alarmed),
        ("twin gates with a violation", twins.gate_alarms),
    ]
    return [row, *(_record(what, score) for what, score in alarms if score is not None)]


def _localisation(families: Sequence[Family]) -> list[dict[str, Any]]:
    rows = []
    for what, read, goal in (
        ("all families: first word named is a planted one", lambda f: f.top, LOCALISED_AT_LEAST),
        ("all families: component confirmed", lambda f: f.component, LOCALISED_AT_LEAST),
        ("all families: poisoned shard first", lambda f: f.shard, SHARD_AT_LEAST),
    ):
        score = pooled(families, read)
        if score is not None:
            rows.append(_record(what, score, goal=goal, met=score.value >= goal))
    return rows


def _record(
    metric: str,
    score: Score | None,
    *,
    goal: float | None = None,
    met: bool | None = None,
    most: bool = False,
    **more: Any,
) -> dict[str, Any]:
    row: dict[str, Any] = {"metric": metric, "value": None if score is None else score.value}
    if score is not None:
        row |= {"low": score.low, "high": score.high, "n": score.n}
    limit = None if goal is None else f"{'at most' if most else 'at least'} {goal:g}"
    return row | {"goal": limit, "met": met, **more}


def escaped(text: str) -> str:
    """Text inside a markdown table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")
