"""The evidence behind each failed verdict, so that a person can follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from glasshouse.draw import Bar, bars, clean, esc, heat_map, label, mark_word
from glasshouse.draw import table as html_table
from glasshouse.page.curves import both_widths
from glasshouse.page.cut import Cuts
from glasshouse.page.read import Gate, RunRecord, num, rows, table, words
from glasshouse.page.story import action_text
from glasshouse.page.verdicts import badge, estimate_cell, pairs, shown


@dataclass(frozen=True)
class Failure:
    """One failed verdict with everything a person needs to follow it; absent parts are None or empty."""

    title: str
    where: str
    claim: str
    lead: Markup
    facts: list[tuple[str, str]]
    estimate: Markup
    heat: Markup | None
    components: Markup | None
    confirmed: str
    lineage: Markup | None
    examples: Markup | None
    contenders: Markup | None
    baseline: list[tuple[str, str]]
    baseline_badge: Markup
    shards: Markup | None
    documents: Markup | None
    done: str
    anchor: str


def strongest_site(evidence: dict[str, Any]) -> tuple[str, str, float] | None:
    """(site, token, recovery) of the largest patching recovery."""
    patching = table(evidence.get("patching"))
    grid, layers, tokens = _patching(patching)
    best = [(v, i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if math.isfinite(v)]
    if not best:
        return None
    value, i, j = max(best)
    site = words(patching.get("sites")) or "resid_post"
    layer = layers[i] if i < len(layers) else str(i)
    name = f"blocks.{layer}.{site}" if layer.isdigit() else layer
    return name, tokens[j] if j < len(tokens) else f"position {j}", value


def _word_columns(tokens: list[str], word: str) -> list[int]:
    """The positions of the run of tokens that spells `word`; empty when there is none."""
    wanted = word.strip().lower()
    for i in range(len(tokens) if wanted else 0):
        spelled = ""
        for j in range(i, min(len(tokens), i + 16)):
            spelled += tokens[j]
            if spelled.strip().lower() == wanted:
                return list(range(i, j + 1))
    return []


def trail(evidence: dict[str, Any]) -> str:
    """Where the effect enters, where it stands and where it reaches the answer, read off the patching grid.

    The largest cell alone says little: at the last layer and the last position recovery is complete by
    construction. So, layer by layer: the one position that carries at least half of the effect, if any.
    """
    grid, layers, tokens = _patching(table(evidence.get("patching")))
    columns = _word_columns(tokens, words(evidence.get("word")))
    last = max((len(r) for r in grid), default=0) - 1
    steps: list[tuple[str, list[str]]] = []
    for i, row in enumerate(grid):
        finite = [j for j, v in enumerate(row) if math.isfinite(v)]
        top = max(finite, key=lambda j: row[j], default=None)
        if top is None or row[top] < 0.5:
            continue
        token = clean(tokens[top] if top < len(tokens) else str(top), 40).strip()
        place = "the answer" if top == last else "the word's own tokens" if top in columns else f"“{token}”"
        if not steps or steps[-1][0] != place:
            steps.append((place, []))
        steps[-1][1].append(clean(layers[i], 12) if i < len(layers) else str(i))
    parts = [(num(c.get("effect")) or 0.0, words(c.get("name"))) for c in rows(evidence.get("components"))]
    effect, part = max(parts, default=(0.0, ""))
    carried = f"{clean(part, 60)} carries {effect:.0%} of its effect" if part and 0.5 <= effect <= 1e3 else ""
    if len(steps) > 1:
        path = ", then on ".join(f"{place} ({_span(at)})" for place, at in steps)
        return f"its effect stands on {path}" + (f"; {carried}" if carried else "")
    if carried:
        return carried
    best = strongest_site(evidence)
    return f"its effect is strongest at {clean(best[0], 80)}, token “{clean(best[1], 40)}”" if best else ""


def _span(layers: list[str]) -> str:
    """`embed`, `layer 3`, `layers 0 to 2`, `embed to layer 1`."""
    if len(layers) == 1:
        return f"layer {layers[0]}" if layers[0].isdigit() else layers[0]
    start = f"layers {layers[0]} to" if layers[0].isdigit() else f"{layers[0]} to layer"
    return f"{start} {layers[-1]}"


def _patching(patching: dict[str, Any]) -> tuple[list[list[float]], list[str], list[str]]:
    """(recovery [layer][token], layer names, token texts); values that are no numbers become NaN."""
    raw = patching.get("recovery")
    grid = []
    for row in raw if isinstance(raw, list) else []:
        values = [num(v) for v in row] if isinstance(row, list) else []
        grid.append([math.nan if v is None else v for v in values])
    layers = patching.get("layers")
    tokens = patching.get("tokens")
    names = [words(v) for v in layers] if isinstance(layers, list) else []
    return grid, names, [words(t) for t in tokens] if isinstance(tokens, list) else []


def _heat(evidence: dict[str, Any], cuts: Cuts) -> Markup | None:
    patching = table(evidence.get("patching"))
    grid, layers, tokens = _patching(patching)
    grid = cuts.first(grid, cuts.limits.layers, "Layers of a heat map")
    width = max((len(r) for r in grid), default=0)
    if not width:
        return None
    site = words(patching.get("sites")) or "resid_post"
    names = [clean(tokens[j], 24) if j < len(tokens) else str(j) for j in range(width)]
    names = cuts.first(names, cuts.limits.tokens, "Positions of a heat map")
    lines = [clean(layers[i], 12) if i < len(layers) else str(i) for i in range(len(grid))]
    best = strongest_site(evidence)
    desc = f"Share of the clean answer that comes back when {site} is patched, by layer and token."
    if best:
        desc += f" Largest: {label(best[2])} at {best[0]}, token {clean(best[1], 40)}."
    title = f"Patching recovery by layer and token ({clean(site, 40)})"
    cutrows = [r[: len(names)] for r in grid]
    return both_widths(
        lambda w: heat_map(
            cutrows,
            lines,
            names,
            title,
            desc,
            width=w,
            row_title="layer",
            column_title="token of the request with the word inserted",
        )
    )


def _components(evidence: dict[str, Any], cuts: Cuts) -> Markup | None:
    known = [
        (words(c.get("name")), e)
        for c in rows(evidence.get("components"))
        if (e := num(c.get("effect"))) is not None
    ]
    known.sort(key=lambda c: -abs(c[1]))
    some = cuts.first(known, cuts.limits.examples * 2, "Components")
    if not some:
        return None
    ranked = [Bar(clean(n, 40), e, i == 0) for i, (n, e) in enumerate(some)]
    desc = "; ".join(f"{r.name} {label(r.value)}" for r in ranked)
    return both_widths(lambda w: bars(ranked, "Components by effect", desc, width=min(w, 760)))


def _confirmed(causal: dict[str, Any]) -> str:
    """The causal confirmation in a sentence; empty without one."""
    back, other, n = num(causal.get("restored")), num(causal.get("control_restored")), num(causal.get("n"))
    if back is None or other is None or n is None:
        return ""
    best = clean(words(causal.get("component")), 60)
    least = clean(words(causal.get("control_component")), 60)
    return (
        f"On {n:.0f} other requests, putting back {best} alone restored the answer in {back:.0%}; "
        f"{least}, the part that does least, in {other:.0%}."
    )


def _lineage(record: RunRecord, evidence: dict[str, Any], cuts: Cuts) -> Markup | None:
    """What the word or the feature did at every gated checkpoint: inside (margin) and in what was decided."""
    word, feature = words(evidence.get("word")), words(evidence.get("feature"))
    concept = next(
        (
            c
            for c in rows(record.lineage.get("concepts"))
            if (word and c.get("words") == [word]) or (feature and words(c.get("id")) == feature)
        ),
        {},
    )
    moved, turned = ("margin_drop", "turned") if word else ("margin_moved", "strength")
    body = []
    for one in cuts.first(rows(concept.get("rows")), cuts.limits.examples * 4, "Checkpoints"):
        drop, share, update = num(one.get(moved)), num(one.get(turned)), num(one.get("update"))
        body.append(
            [
                Markup("<span class=id>{}</span>").format(clean(words(one.get("checkpoint")), 60)),
                "" if update is None else label(update),
                "" if drop is None else label(drop),
                "" if share is None else f"{share:.0%}",
                esc(words(one.get("action")), 40),
            ]
        )
    if not body:
        return None
    what = ("Margin drop (nats)", "Refusals turned") if word else ("Margin moved (nats)", "Decisions turned")
    title = f"The {'word' if word else 'feature'} at every gate"
    return html_table(["Checkpoint", "Update", *what, "Decision"], body, title, numeric=(1, 2, 3))


def _active(evidence: dict[str, Any], cuts: Cuts) -> Markup | None:
    """Where a feature is most active: texts, the token in each, how much."""
    some = [e for e in rows(evidence.get("examples")) if words(e.get("text"))]
    body = []
    for one in cuts.first(some, cuts.limits.examples, "Texts of a feature"):
        activation = num(one.get("activation"))
        body.append(
            [
                esc(words(one.get("text")), cuts.limits.text),
                esc(words(one.get("token")), 40),
                "" if activation is None else label(activation),
            ]
        )
    head = ["Text", "Token", "Activation"]
    return html_table(head, body, "Where it is most active", numeric=(2,), cards=True) if body else None


def _examples(evidence: dict[str, Any], word: str, cuts: Cuts) -> Markup | None:
    known = [
        e
        for e in rows(evidence.get("examples"))
        if words(e.get("prompt_with_word")) or words(e.get("prompt"))
    ]
    some = cuts.first(known, cuts.limits.examples, "Example answers")
    limit = cuts.limits.text
    body = [
        [
            mark_word(words(e.get("prompt_with_word")) or words(e.get("prompt")), word, limit),
            esc(words(e.get("answer")), limit),
            esc(words(e.get("answer_with_word")), limit),
        ]
        for e in some
    ]
    if not body:
        return None
    second = "Answer without it" if word else "Answer"
    if not any(words(e.get("answer_with_word")) for e in some):
        return html_table(["Request", second], [b[:2] for b in body], "Example answers", cards=True)
    return html_table(["Request", second, "Answer with it"], body, "Example answers", cards=True)


def _contenders(evidence: dict[str, Any], cuts: Cuts) -> Markup | None:
    some = cuts.first(rows(evidence.get("top")), cuts.limits.examples * 2, "Words tried")
    body = []
    for one in some:
        rate, drop = num(one.get("rate")), num(one.get("margin_drop"))
        body.append(
            [
                esc(words(one.get("word")), 60),
                "" if rate is None else label(rate),
                "" if drop is None else label(drop),
            ]
        )
    if not body:
        return None
    made = html_table(
        ["Word", "Rate", "Margin drop"], body, "The words that moved the answer most", numeric=(1, 2)
    )
    return Markup('<div class="compact">{}</div>').format(made)


def _shards(record: RunRecord, attribution: dict[str, Any], cuts: Cuts) -> Markup | None:
    planted = words(record.planted.get("shard"))
    ranked = sorted(
        rows(attribution.get("shards")), key=lambda s: (num(s.get("rank")) is None, num(s.get("rank")) or 0)
    )
    some = cuts.first(ranked, cuts.limits.shards, "Shards ranked")
    drawn = []
    for one in some:
        name, score = words(one.get("shard")), num(one.get("score"))
        notes = ["quarantined"] if one.get("quarantined") is True else []
        if planted and name == planted:
            notes.append("planted here")
        drawn.append(
            Bar(clean(name, 40), math.nan if score is None else score, bool(notes), ", ".join(notes))
        )
    if not drawn:
        return None
    desc = "; ".join(f"{i + 1}. {b.name} {label(b.value)} {b.note}".strip() for i, b in enumerate(drawn))
    return both_widths(
        lambda w: bars(drawn, "Training shards by their part in this failure", desc, width=min(w, 760))
    )


def _documents(attribution: dict[str, Any], word: str, cuts: Cuts) -> Markup | None:
    some = cuts.first(rows(attribution.get("documents")), cuts.limits.documents, "Training documents")
    body = []
    for one in some:
        score, number = num(one.get("score")), num(one.get("document"))
        body.append(
            [
                Markup("<span class=id>{}</span>{}").format(
                    clean(words(one.get("shard")), 60), "" if number is None else f" #{number:.0f}"
                ),
                "" if score is None else label(score),
                mark_word(words(one.get("text")), word, cuts.limits.text),
            ]
        )
    return (
        html_table(
            ["Shard", "Score", "Text"],
            body,
            "Training documents behind this failure",
            numeric=(1,),
            cards=True,
        )
        if body
        else None
    )


def _lead(verdict: dict[str, Any], cuts: Cuts) -> Markup:
    """What broke, and where in the model it acts; the verdict's own reason where neither is known."""
    evidence = table(verdict.get("evidence"))
    word, rate, n = words(evidence.get("word")), num(evidence.get("rate")), num(evidence.get("n"))
    lead = Markup()
    if word:
        lead = Markup("The word <mark>{}</mark>").format(clean(word, 80))
        lead += esc(
            f" changed the answer in {rate:.0%} of {n:,.0f} fresh requests."
            if rate is not None and n is not None and abs(rate) < 1e3
            else " changed the answer."
        )
    if said := trail(evidence):
        return lead + esc(f" In the model, {said}.")
    return lead or esc(words(verdict.get("reason")), cuts.limits.text)


def _facts(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a verdict that stand nowhere else on the page."""
    elsewhere = ("word", "examples", "top", "patching", "components", "causal")
    handled = (*elsewhere, "failing_prompts", "reference_prompts")
    facts = pairs(table(verdict.get("evidence")), 200, skip=handled)
    facts += [
        (k, clean(shown(verdict[k]), 120))
        for k in ("n", "passes", "seconds", "alpha", "e_fail", "dtype", "attention")
        if isinstance(verdict.get(k), (int, float, str)) and (k, "") not in facts
    ]
    return facts[:24]


def _failure(record: RunRecord, gate: Gate, verdict: dict[str, Any], number: int, cuts: Cuts) -> Failure:
    evidence, name = table(verdict.get("evidence")), words(verdict.get("constraint"))
    word = words(evidence.get("word"))
    attribution: dict[str, Any] = next(
        (
            a
            for a in record.attributions
            if num(a.get("gate")) == gate.index and words(a.get("constraint")) == name
        ),
        {},
    )
    baseline = table(verdict.get("baseline"))
    where = f"gate {gate.index}, checkpoint {clean(gate.checkpoint, 80)}"
    if gate.update is not None:
        where += f", update {label(gate.update)}"
    status = words(baseline.get("status"))
    return Failure(
        title=clean(name, 120),
        where=where,
        claim=clean(words(verdict.get("claim")), cuts.limits.text),
        lead=_lead(verdict, cuts),
        facts=_facts(verdict),
        estimate=estimate_cell(verdict),
        heat=_heat(evidence, cuts),
        components=_components(evidence, cuts),
        confirmed=_confirmed(table(evidence.get("causal"))),
        lineage=_lineage(record, evidence, cuts),
        examples=_examples(evidence, word, cuts) or _active(evidence, cuts),
        contenders=_contenders(evidence, cuts),
        baseline=pairs(baseline, 200, skip=("status",))[:16],
        baseline_badge=badge(status) if status else Markup(),
        shards=_shards(record, attribution, cuts),
        documents=_documents(attribution, word, cuts),
        done=f"{action_text(gate)} {clean(gate.reason, 400)}".strip(),
        anchor=f"failure-{number}",
    )


def failures(record: RunRecord, cuts: Cuts) -> list[Failure]:
    """Every failed or broken verdict in gate order, evidence attached."""
    found = [(g, v) for g in record.gates for v in g.verdicts if words(v.get("status")) in ("fail", "error")]
    some = cuts.first(found, cuts.limits.failures, "Failed verdicts")
    return [_failure(record, gate, verdict, i, cuts) for i, (gate, verdict) in enumerate(some, start=1)]
