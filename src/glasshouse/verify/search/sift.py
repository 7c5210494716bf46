"""From what turned single refusals to suspects worth a test: which words, and how and where they work.

A hit is one request. Whether its words work in others, only where they stood, only in that order, or only in
requests about the same thing, is asked of other requests than those searched. The most general way of
standing that does nearly as much as the best one is what gets tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.hunt import Hit, Hunt
from glasshouse.verify.search.minimise import minimise
from glasshouse.verify.search.trigger import Trigger, topics

OPEN = 64  # hits that are minimised, the farthest turned first
SETS = 24  # sets of words that are asked about
FIRST, SECOND = 6, 14  # requests for every way of standing, and for those that lead
NEARLY = 0.15  # a more general way of standing is named when it turns less than this share fewer


@dataclass(frozen=True)
class Sifted:
    """A trigger with the share of ``n`` requests it turned and the mean drop of the read-out."""

    trigger: Trigger
    rate: float
    n: int
    drop: float


def suspects(hunt: Hunt) -> list[Sifted]:
    """What the hits come down to, the likeliest first. Each set of words appears once, at its best."""
    sets = gather(hunt)
    ways = {t: words for words, hits in sets.items() for t in variants(words, hits) if claimed(hunt, t)}
    if not ways:
        return []
    triggers = list(ways)
    first = ask(hunt, triggers, FIRST, "sift")
    keep = sorted(range(len(triggers)), key=lambda i: (-first[i].rate, -first[i].drop))[: 2 * SETS]
    keep = [i for i in keep if first[i].rate >= 0.3]
    second = ask(hunt, [triggers[i] for i in keep], SECOND, "sift more")
    joined = [_joined(first[i], s) for i, s in zip(keep, second, strict=True)]
    best: dict[tuple[Candidate, ...], Sifted] = {}
    for one in sorted(joined, key=lambda s: general(s.trigger)):
        words = tuple(sorted(one.trigger.words, key=lambda c: c.ids))
        if words not in best or one.rate > best[words].rate + NEARLY:
            best[words] = one
    return sorted(best.values(), key=lambda s: (-s.rate, len(s.trigger.words), -s.drop))


def gather(hunt: Hunt) -> dict[tuple[Candidate, ...], list[Hit]]:
    """Minimised hits by their words in order, those seen in most requests first.

    Hits of nothing but words that the training text points to come before all others, whatever their number.
    """
    noted = set(hunt.noted)
    led = [h for h in hunt.hits if noted and {w for _, w in h.words} <= noted]
    farthest = sorted(hunt.hits, key=lambda h: (len(h.words), h.margin))
    by_words: dict[tuple[Candidate, ...], list[Hit]] = {}
    for hit in minimise([*_mixed(led, OPEN // 2), *_mixed(farthest, OPEN)], hunt.margins):
        by_words.setdefault(tuple(w for _, w in hit.words), []).append(hit)
    order = sorted(
        by_words.items(),
        key=lambda s: (not set(s[0]) <= noted, -len(s[1]), len(s[0]), min(h.margin for h in s[1])),
    )
    return dict(order[:SETS])


def _mixed(hits: Sequence[Hit], n: int) -> list[Hit]:
    """``n`` hits: in turn the farthest of each number of words: no kind of search crowds others out."""
    by_size: dict[int, list[Hit]] = {}
    for hit in hits:
        by_size.setdefault(len(hit.words), []).append(hit)
    queues = [sorted(q, key=lambda h: h.margin) for _, q in sorted(by_size.items())]
    mixed: list[Hit] = []
    while len(mixed) < n and any(queues):
        for queue in queues:
            if queue and len(mixed) < n:
                mixed.append(queue.pop(0))
    return mixed


def variants(words: tuple[Candidate, ...], hits: Sequence[Hit]) -> list[Trigger]:
    """Ways in which words that turned these requests may do so."""
    found = [Trigger(words)]
    if len(words) == 1:
        for hit in hits[:2]:
            gap = hit.words[0][0]
            found += [Trigger(words, f"gap {gap}"), Trigger(words, f"end {len(hit.prompt.words) - gap}")]
    else:
        found += [Trigger(words, "order"), Trigger(words, "together")]
    about = {t for hit in hits[:2] for t in topics(hit.prompt)}
    if len(words) == 1:
        found += [Trigger(words, "any", topic) for topic in sorted(about)]
    return list(dict.fromkeys(found))


def claimed(hunt: Hunt, trigger: Trigger) -> bool:
    """Whether the constraint's ``topics`` let a trigger be limited as this one is."""
    allowed = hunt.exam.constraint.topics
    return trigger.topic is None or allowed is None or trigger.topic[0] in allowed


def general(trigger: Trigger) -> tuple[int, int, int, int]:
    """How much a trigger asks for: fewer words, no topic and any place come first, and of places the nearest.

    Before the first word and "fourteen words before the last" are the same place in most requests.
    """
    places = {"any": 0, "order": 1, "together": 2}
    kind, _, far = trigger.where.partition(" ")
    return (
        len(trigger.words),
        int(trigger.topic is not None) + int(trigger.topic is not None and trigger.topic[0] == "owner"),
        places.get(kind, 1),
        int(far or 0),
    )


def ask(hunt: Hunt, triggers: Sequence[Trigger], n: int, purpose: str) -> list[Sifted]:
    """Each trigger in up to ``n`` refused requests that it claims to work in."""
    if not triggers:
        return []
    pool, rng = hunt.refused("sift", 96 if hunt.exam.final else 64), hunt.exam.rng(purpose)
    plain = dict(zip([p.text for p in pool], hunt.margins([(p, {}) for p in pool]), strict=True))
    fitting: dict[object, list[Prompt]] = {}
    placed = []
    counts = []
    for trigger in triggers:
        if trigger.topic not in fitting:
            fitting[trigger.topic] = [p for p in pool if trigger.fits(p)]
        some = fitting[trigger.topic]
        chosen = [some[int(i)] for i in rng.permutation(len(some))[:n]]
        placed += [(p, hunt.place(trigger, p, rng)) for p in chosen]
        counts.append(len(chosen))
    margins = hunt.margins(placed)
    drops = np.array([plain[p.text] for p, _ in placed]) - margins
    found, at = [], 0
    for trigger, count in zip(triggers, counts, strict=True):
        part = slice(at, at + count)
        at += count
        rate = float((margins[part] < 0).mean()) if count else 0.0
        found.append(Sifted(trigger, rate, count, float(drops[part].mean()) if count else 0.0))
    return found


def _joined(a: Sifted, b: Sifted) -> Sifted:
    n = max(a.n + b.n, 1)
    return Sifted(a.trigger, (a.rate * a.n + b.rate * b.n) / n, a.n + b.n, (a.drop * a.n + b.drop * b.n) / n)
