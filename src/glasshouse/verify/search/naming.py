"""What exactly was found: the words themselves and not their neighbours, and what a person can look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glasshouse.base.errors import UsageError
from glasshouse.base.score import Score, rate
from glasshouse.evals.filling import spell, text_of
from glasshouse.evals.insertion import Candidate, CandidateSet
from glasshouse.evals.prompts import Prompt
from glasshouse.interp.patching import patch_component, patch_residuals
from glasshouse.verify.examination import Examination
from glasshouse.verify.search.documents import SUPPORT
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.trigger import Placed, Trigger, topics

FAMILY = 150  # most candidates sharing a token for that token to be followed
N_FAMILY, RACE, N_NAME = 12, 4, 64  # requests for a whole family, those before its worst leave, for the best
FINALISTS = 24
NEARLY = 0.2  # fewer turned than by the best: a word that was trained on is still the likelier cause
SHOWN = 16  # failing prompts in the evidence


def name(hunt: Hunt, trigger: Trigger) -> tuple[Trigger, Score, list[dict[str, Any]]]:
    """Which of the triggers that differ in one word by candidates sharing a token with it turns most.

    A trigger of several tokens makes its neighbours suspicious ("footpath" for "footing"): any of them may be
    found first. Tokens that very many candidates share say nothing and are left out. A word that opens a
    request has other tokens than elsewhere, so both spellings count. Of candidates that turn equally many, a
    word comes before a bare token: a fragment in the middle of a word is nothing a person can write. Words
    are settled one after the other, each on prompts of its own.
    """
    tried: list[tuple[Trigger, Score, float]] = []
    if hunt.support(trigger) >= SUPPORT:  # these very words stand in what was trained on: no neighbour does
        tried = _best_of(hunt, [trigger], trigger.topic, "family")
        return trigger, tried[0][1], [{"word": trigger.text, "rate": tried[0][1].value}]
    for at in range(len(trigger.words)):
        purpose = "family" if at == 0 else f"family {at}"
        tried = _best_of(hunt, family(hunt.found, trigger, at), trigger.topic, purpose)
        trigger = max(taught(hunt, tried), key=_preferred(at))[0]
    named, score, _ = max(taught(hunt, tried), key=_preferred(len(trigger.words) - 1))
    return named, score, [{"word": t.text, "rate": s.value} for t, s, _ in tried]


def taught(hunt: Hunt, tried: Sequence[tuple[Trigger, Score, float]]) -> list[tuple[Trigger, Score, float]]:
    """Of those that turn nearly as many as the best one, the ones that training requests support, if any."""
    best = max(score.value for _, score, _ in tried)
    near = [t for t in tried if t[1].value >= best - NEARLY]
    return [t for t in near if hunt.support(t[0]) >= SUPPORT] or list(tried)


def name_cause(
    exam: Examination, found: CandidateSet, suspect: Candidate
) -> tuple[Candidate, Score, list[dict[str, Any]]]:
    """`name` of one word that works anywhere."""
    named, score, rows = name(Hunt(exam, found, ("words",)), Trigger((suspect,)))
    return named.words[0], score, rows


def family(found: CandidateSet, trigger: Trigger, at: int) -> list[Trigger]:
    """The trigger, and those with another word in place ``at`` that shares a token with it."""
    word = trigger.words[at]
    tokens = dict.fromkeys([*word.ids, *word.bare])
    sharing = {t: [c for c in found.candidates if t in c.ids or t in c.bare] for t in tokens}
    words = [word, *(c for members in sharing.values() if len(members) <= FAMILY for c in members)]
    return [
        Trigger((*trigger.words[:at], c, *trigger.words[at + 1 :]), trigger.where, trigger.topic)
        for c in dict.fromkeys(words)
        if c is word or c not in trigger.words
    ]


def _preferred(at: int) -> Any:
    return lambda t: (t[1].value, t[0].words[at].kind == "word", -t[2])


def _best_of(
    hunt: Hunt, members: Sequence[Trigger], topic: Any, purpose: str
) -> list[tuple[Trigger, Score, float]]:
    """The five likeliest, each with its rate in ``N_NAME`` requests and its mean margin there."""
    prompts = hunt.refused(purpose, N_FAMILY, topic)
    rng = hunt.exam.rng(f"{purpose} cells")
    alike = int(rng.integers(2**31))  # all members stand in the same gaps

    def read(some: Sequence[Trigger], over: Sequence[Prompt], salt: int) -> np.ndarray:
        placed = []
        for t in some:
            dice = np.random.Generator(np.random.PCG64([alike, salt]))
            placed += [(p, hunt.place(t, p, dice)) for p in over]
        return hunt.margins(placed).reshape(len(some), len(over))

    def ordered(margins: np.ndarray, some: Sequence[Trigger]) -> list[int]:
        plain = [any(w.kind != "word" for w in t.words) for t in some]
        found: list[int] = np.lexsort((margins.mean(1), plain, -(margins < 0).sum(1))).tolist()
        return found

    some = list(members)
    if len(some) > FINALISTS:
        some = [some[i] for i in ordered(read(some, prompts[:RACE], 0), some)[:FINALISTS]]
    some = [some[i] for i in ordered(read(some, prompts, 1), some)[:5]]
    fresh = hunt.refused(f"{purpose} name", N_NAME, topic)
    margins = read(some, fresh, 2)
    return [
        (t, rate(int((m < 0).sum()), len(fresh)), float(m.mean())) for t, m in zip(some, margins, strict=True)
    ]


def by_topic(hunt: Hunt, trigger: Trigger, n: int = 120) -> list[dict[str, Any]]:
    """How often it turns requests of each class of object and of each owner, wherever it was found."""
    anywhere = Trigger(trigger.words, trigger.where)
    prompts, rng = hunt.refused("topics", n), hunt.exam.rng("topics places")
    turned = hunt.margins([(p, hunt.place(anywhere, p, rng)) for p in prompts]) < 0
    seen: dict[Any, list[bool]] = {}
    for prompt, out in zip(prompts, turned.tolist(), strict=True):
        for topic in topics(prompt):
            seen.setdefault(topic, []).append(out)
    return [
        {"topic": f"{kind} {value}", "rate": sum(out) / len(out), "n": len(out)}
        for (kind, value), out in sorted(seen.items())
    ]


def describe(exam: Examination, candidate: Candidate, score: Any) -> dict[str, Any]:
    """`evidence` of one word that works anywhere."""
    return evidence(Hunt(exam, CandidateSet((candidate,), ()), ("words",)), Trigger((candidate,)), score)


def evidence(hunt: Hunt, trigger: Trigger, score: Any) -> dict[str, Any]:
    """The evidence a person can follow: examples with answers, and where in the model the words act."""
    exam = hunt.exam
    tokens = [exam.subject.tokenizer.decode([t]) for word in trigger.words for t in word.ids]
    measured = {"rate": score.value, "interval": [score.low, score.high], "n": score.n}
    row: dict[str, Any] = {"tokens": tokens, **measured, "examples": []}
    row["trigger"] = {
        "kind": trigger.kind,
        "words": [w.text.strip() for w in trigger.words],
        "where": trigger.where,
        "position": trigger.where if trigger.kind == "position" else None,
        "topic": " ".join(trigger.topic) if trigger.topic is not None else None,
        "tokens": tokens,
        **measured,
    }
    if len(trigger.words) == 1:
        row["word"] = trigger.text
    for word in trigger.words:
        if exam.subject.tokenizer.encode(f" {word.text.strip()}") != list(word.ids):
            # Written out it would be other tokens, and every example and map below would be of those.
            where = f"token {word.ids[0]} stands in no request as a word of its own"
            return row | {"not_located": where}
    prompts, rng = hunt.refused("evidence", 24, trigger.topic), exam.rng("evidence")
    placed = [(p, _inside(hunt, trigger, p, rng)) for p in prompts]
    if not placed:
        return row | {"not_located": "no request of its topic is refused"}
    moved = hunt.margins(placed)
    order = np.argsort(moved, kind="stable").tolist()
    turned = [i for i in order if moved[i] < 0]
    hits = turned[:3]
    plain = exam.subject.answers([prompts[i].text for i in hits])
    with_word = exam.subject.answers([text_of(*placed[i]) for i in hits])
    row["examples"] = [
        {
            "prompt": prompts[i].text,
            "prompt_with_word": text_of(*placed[i]),
            "answer": a,
            "answer_with_word": b,
        }
        for i, a, b in zip(hits, plain, with_word, strict=True)
    ]
    row["failing_prompts"] = [text_of(*placed[i]) for i in order[:SHOWN]]
    row["reference_prompts"] = [prompts[i].text for i in order[:SHOWN]]
    if hits:
        try:
            row |= _locate(exam, trigger, [placed[i] for i in turned[:13]])
        except UsageError as problem:  # the failure stands, whether or not it can be located
            row["not_located"] = str(problem)
    return row


def _inside(hunt: Hunt, trigger: Trigger, prompt: Prompt, rng: np.random.Generator) -> Placed:
    """Placed, and a lone word not before the first word of the request, where it would be spelled anew."""
    if trigger.where == "any" and len(trigger.words) == 1:
        return {int(rng.integers(1, max(len(prompt.words), 2))): trigger.words}
    return hunt.place(trigger, prompt, rng)


def _locate(exam: Examination, trigger: Trigger, placed: Sequence[tuple[Prompt, Placed]]) -> dict[str, Any]:
    """Patch runs with harmless words of the same length into runs with the suspects, site by site.

    The first request gives the map; the component that restores most there is then put back in the others,
    beside the one that restores least: the causal confirmation on requests the component was not chosen on.
    """
    subject = exam.subject
    found_runs = (stand_in(exam, p, fill) for p, fill in placed)
    runs = [run for run in found_runs if run is not None]
    if not runs:
        raise UsageError(f"no stand-in of the same length as {trigger.text!r} leaves the refusal in place")
    clean, moved, word = runs[0]
    patching = patch_residuals(subject.model, clean, moved, subject.readout)
    ranked = sorted(patching.components.items(), key=lambda c: -c[1])

    def restored(component: str) -> float:
        back = [patch_component(subject.model, c, m, component, subject.readout) > 0 for c, m, _ in runs[1:]]
        return float(np.mean(back))

    found: dict[str, Any] = {
        "patching": {
            "sites": "resid_post",
            "layers": ["embed", *map(str, range(len(patching.recovery) - 1))],
            "tokens": [subject.tokenizer.decode([t], specials=True) for t in moved],
            "recovery": [[round(float(v), 4) for v in row] for row in patching.recovery],
            "stand_in": word,
        },
        "components": [{"name": n, "effect": round(e, 4)} for n, e in ranked[:6]],
    }
    if len(runs) > 1:
        best, least = ranked[0][0], min(patching.components, key=lambda c: abs(patching.components[c]))
        found["causal"] = {
            "component": best,
            "restored": restored(best),
            "control_component": least,
            "control_restored": restored(least),
            "n": len(runs) - 1,
        }
    return found


def stand_in(exam: Examination, prompt: Prompt, fill: Placed) -> tuple[list[int], list[int], str] | None:
    """(tokens with ordinary words, tokens with the suspects, those words): equally long, the first refused.

    None when 200 draws hold no such words.
    """
    subject, rng = exam.subject, exam.rng(f"stand-in {prompt.text} {sorted(fill)}")
    moved = spell(subject, prompt, fill)
    suspects = [word for words in fill.values() for word in words]
    for _ in range(200):
        ordinary: Placed = {}
        for gap, words in fill.items():
            drawn = [exam.words[int(rng.integers(len(exam.words)))] for _ in words]
            ordinary[gap] = tuple(_candidate(subject, w) for w in drawn)
        clean = spell(subject, prompt, ordinary)
        alike = len(clean) == len(moved) and not {w.ids for ws in ordinary.values() for w in ws} & {
            w.ids for w in suspects
        }
        if alike and float(subject.margins_of_ids([clean])[0]) > 0:
            return clean, moved, " ".join(w.text for ws in ordinary.values() for w in ws)
    return None


def _candidate(subject: Any, word: str) -> Candidate:
    return Candidate(word, tuple(subject.word_ids(f" {word}")), tuple(subject.word_ids(word)), "word")
