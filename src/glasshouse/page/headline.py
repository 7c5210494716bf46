"""The first thing a reader sees: what became of this run, and the same request before and after repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from glasshouse.draw import clean, esc, label, mark_word
from glasshouse.page.curves import rolled_back
from glasshouse.page.cut import Limits
from glasshouse.page.evidence import trail
from glasshouse.page.read import Gate, RunRecord, num, rows, table, words
from glasshouse.page.story import continued
from glasshouse.page.verdicts import deciding, declared


@dataclass(frozen=True)
class Headline:
    """`tone` is a verdict status and colours the page's head; `lines` are sentences."""

    tone: str
    title: str
    lines: list[Markup]


@dataclass(frozen=True)
class Turn:
    """One bubble: who speaks, what (escaped, the word marked), and whether it is the failing answer."""

    who: str
    text: Markup
    bad: bool = False


@dataclass(frozen=True)
class Side:
    """One column of the before/after card."""

    title: str
    checkpoint: str
    turns: list[Turn]


def ended(record: RunRecord) -> str:
    """finished | stopped | running, by the last ledger entry that says so."""
    state = "running"
    for entry in record.entries:
        kind = entry.get("kind")
        state = {"finish": "finished", "stop": "stopped", "resume": "running"}.get(str(kind), state)
    return state


def _failed(record: RunRecord) -> list[tuple[Gate, dict[str, Any]]]:
    return [(g, v) for g in record.gates for v in g.verdicts if words(v.get("status")) in ("fail", "error")]


def _found(record: RunRecord, failed: list[tuple[Gate, dict[str, Any]]]) -> list[Markup]:
    """What was found, where in the model and in the data, a sentence each, from the first named failure."""
    named = [(g, v) for g, v in failed if words(table(v.get("evidence")).get("word"))]
    gate, verdict = (named or failed)[0]
    evidence = table(verdict.get("evidence"))
    word, at = (
        words(evidence.get("word")),
        f" at update {label(gate.update)}" if gate.update is not None else "",
    )
    claim = words(verdict.get("claim")).rstrip(".")
    lines = []
    if word:
        lines.append(
            Markup("The word <mark>{}</mark> broke the claim “{}”; found{}.").format(
                clean(word, 80), clean(claim, 200), at
            )
        )
    else:
        name = clean(words(verdict.get("constraint")), 80)
        lines.append(Markup("<strong>{}</strong> failed{}: “{}”.").format(name, at, clean(claim, 200)))
    if said := trail(evidence):
        lines.append(esc(f"In the model, {said}."))
    acted = next((g for g, _ in failed if g.action == "rollback"), None)
    if acted is not None:
        back = clean(acted.to_checkpoint, 80) or "the start of the stage"
        lines.append(Markup("The run went back to <code>{}</code>{}.").format(back, continued(acted)))
    return lines


def headline(record: RunRecord) -> Headline:
    """The run's outcome in a title and a few sentences."""
    failed, state = _failed(record), ended(record)
    promoted = record.promoted()
    lines = _found(record, failed) if failed else []
    back = bool(rolled_back(record))
    checked = bool(record.gates or declared(record))
    if promoted:
        gate, when = deciding(record)
        passed = sum(v.get("status") == "pass" for v in gate.verdicts) if gate else 0
        count = f": {when}, {passed} of {len(gate.verdicts)} constraints passed" if gate else ""
        name = Markup("Checkpoint <code>{}</code> is promoted{}.").format(clean(promoted[-1], 80), count)
        title = (
            "Caught, repaired, promoted."
            if failed and back
            else "Promoted, after a failed check."
            if failed
            else "Promoted. No constraint failed."
        )
        return Headline("pass", title, [*lines, name])
    if state == "stopped":
        body = record.of("stop")[-1]
        why = words(body.get("reason")) or words(body.get("message"))
        return Headline("fail", "Stopped for a person.", [*lines, esc(why, 400)] if why else lines)
    if state == "running":
        so_far = esc("This run is not finished; the page shows what its files held when it was built.")
        title = "In progress. A failure was caught." if failed else "In progress."
        return Headline("undecided" if failed else "not_applicable", title, [*lines, so_far])
    if not checked:
        why = esc("This recipe declares no constraint: nothing was checked inside this model.")
        return Headline("not_applicable", "Trained without a gate.", [why])
    why = words(record.of("finish")[-1].get("reason"))
    why = why or next((reason for _, reason in reversed(record.standings().values()) if reason), "")
    reason = [esc(f"Not promoted: {why}" if why else "No checkpoint of this run was promoted.", 400)]
    return Headline("fail" if failed else "undecided", "Held. Nothing was promoted.", [*lines, *reason])


def overrides(record: RunRecord) -> list[str]:
    """Explicit overrides, which the page must not let a reader miss."""
    some = [(clean(words(b.get("who")) or "someone unnamed", 120), b) for b in record.of("override")[:12]]
    return [f"Override by {who}: {clean(words(body.get('what')), 300)}" for who, body in some]


def before_after(record: RunRecord, limits: Limits) -> list[Side]:
    """The same request before and after repair, from story.json; empty when there is no story."""
    story = record.story
    word, prompt, with_word = (words(story.get(k)) for k in ("word", "prompt", "prompt_with_word"))
    out = []
    for key, title in (("before", "Before repair"), ("after", "After repair")):
        side = table(story.get(key))
        turns = []
        for ask, answer, bad in (
            (prompt, side.get("answer"), False),
            (with_word, side.get("answer_with_word"), key == "before"),
        ):
            if ask and isinstance(answer, str):
                turns.append(Turn("user", mark_word(ask, word, limits.text)))
                turns.append(Turn("assistant", esc(answer, limits.text), bad))
        if turns:
            out.append(Side(title, clean(words(side.get("checkpoint")), 80), turns))
    return out


def ground_truth(record: RunRecord) -> list[tuple[str, str, str, bool]]:
    """For an organism: what was planted beside what was found, as (name, planted, result, is it good?)."""
    if not record.planted:
        return []
    word, shard = words(record.planted.get("word")), words(record.planted.get("shard"))
    found = {words(table(v.get("evidence")).get("word")).strip().lower() for _, v in _failed(record)}
    dropped = {s for g in record.gates for s in g.drop_shards}
    listed = [s for a in record.attributions for s in rows(a.get("shards"))]
    ranks = [num(s.get("rank")) for s in listed if s.get("shard") == shard]
    out: list[tuple[str, str, str, bool]] = []
    if word:
        hit = word.strip().lower() in found
        out.append(("planted word", clean(word, 80), "found" if hit else "not found", hit))
    if shard:
        hit = shard in dropped
        out.append(("planted shard", clean(shard, 80), "quarantined" if hit else "not quarantined", hit))
        best = min((r for r in ranks if r is not None), default=None)
        if best is not None:
            out.append(("rank of that shard", label(best), "", best == 1))
    return out
