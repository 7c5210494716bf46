"""The constitutional phases of a run: what each came to, and what was measured of the models after them."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from glasshouse.draw import esc, label
from glasshouse.draw import table as html_table
from glasshouse.page.cut import Cuts
from glasshouse.page.read import RunRecord, num, rows, table, words

TITLES = {
    "revisions": "Critiques and revisions",
    "feedback": "AI feedback",
    "feedback-held-out": "AI feedback, held-out principles",
    "reward": "Reward model",
    "watch": "Reward model of the held-out principles",
}
RATES = {
    "trained": "against a trained principle",
    "held_out": "against a held-out one",
    "helpful": "helped rightly",
    "refused": "refused wrongly",
    "evasive": "evasive",
}


def phase_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """What every closed phase came to, in words."""
    done = record.of("phase")
    body = [
        [esc(TITLES.get(name, name), 60), esc(said(of), 400)]
        for of in cuts.first(done, cuts.limits.items, "Phases")
        if (name := words(of.get("phase")))
    ]
    return html_table(["Phase", "What it came to"], body, "Phases", cards=True) if body else None


def said(of: dict[str, Any]) -> str:
    """A phase's numbers in a sentence."""
    parts = []
    for key, text in (
        ("revisions", "{} revisions trained on"),
        ("helpful", "{} helpful answers"),
        ("pairs", "{} pairs of answers"),
        ("preferences", "{} preferences"),
        ("judge", "judge: {}"),
        ("position", "position: {}"),
    ):
        value = of.get(key)
        if value not in (None, "", 0):
            parts.append(text.format(words(value)))
    if (accuracy := _score(of.get("accuracy"))) is not None:
        parts.append(f"accuracy on held-out pairs {accuracy}")
    if (ece := num(of.get("ece"))) is not None:
        parts.append(f"calibration error {label(ece)}")
    return "; ".join(parts)


def measured_table(record: RunRecord) -> Markup | None:
    """Shares of answers to prompts of unseen combinations, by the model after every stage of the phases."""
    found = next((m for of in reversed(record.of("evidence")) if (m := table(of.get("measured")))), {})
    stages = [words(s.get("name")) for s in rows(record.recipe.get("stage"))]
    order = {name: i for i, name in enumerate(stages)}  # what is no stage is the model they begin with
    body = []
    for name, rates in sorted(found.items(), key=lambda item: order.get(words(item[0]), -1)):
        cells = [_rate(table(table(rates).get(key))) for key in RATES]
        body.append([esc(words(name), 60), *cells])
    head = ["After", *RATES.values()]
    return html_table(head, body, "Answers before and after", cards=True) if body else None


def _rate(score: dict[str, Any]) -> str:
    return _score([score.get(k) for k in ("value", "low", "high")]) or ""


def _score(value: object) -> str | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    known = [num(v) for v in value]
    if any(v is None for v in known):
        return None
    middle, low, high = (100 * (v or 0.0) for v in known)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"
