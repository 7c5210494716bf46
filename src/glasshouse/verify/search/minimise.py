"""From a heap of words that turns a refusal to the fewest of them that still do.

Delta debugging (Zeller & Hildebrandt 2002) on all heaps at once, since a pass costs least in a full batch.
Each round takes every word out alone, orders words by what their absence gives back, and keeps the shortest
head of that order that still turns the refusal. The result is 1-minimal: without any one of its words the
refusal stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.hunt import Hit
from glasshouse.verify.search.trigger import Placed, stacked

Margins = Callable[[Sequence[tuple[Prompt, Placed]]], np.ndarray]
Words = list[tuple[int, Candidate]]


def minimise(hits: Sequence[Hit], margins: Margins) -> list[Hit]:
    """Each hit with the fewest of its words that still turn that request.

    ``margins(placed)`` [n] reads fills; below 0 the refusal is turned.
    """
    words: list[Words] = [h.words for h in hits]
    value = [h.margin for h in hits]
    open_ = [i for i, w in enumerate(words) if len(w) > 1]
    while open_:
        without = _read(hits, margins, [(i, _but(words[i], k)) for i in open_ for k in range(len(words[i]))])
        heads: list[tuple[int, Words]] = []
        at = 0
        for i in open_:
            gained = without[at : at + len(words[i])]  # high: the word was needed
            at += len(words[i])
            order = np.argsort(-gained, kind="stable")
            heads += [(i, _kept(words[i], order[:k].tolist())) for k in range(1, len(words[i]))]
        found = _read(hits, margins, heads)
        shorter: dict[int, tuple[Words, float]] = {}
        for (i, head), margin in zip(heads, found.tolist(), strict=True):
            if margin < 0 and i not in shorter:
                shorter[i] = (head, margin)
        for i, (head, margin) in shorter.items():
            words[i], value[i] = head, margin
        # A head that lacks only the least needed word is among those tried: none turned, none can go.
        open_ = [i for i in shorter if len(words[i]) > 1]
    return [Hit(h.prompt, stacked(w), v, h.source) for h, w, v in zip(hits, words, value, strict=True)]


def _read(hits: Sequence[Hit], margins: Margins, rows: Sequence[tuple[int, Words]]) -> np.ndarray:
    return margins([(hits[i].prompt, stacked(w)) for i, w in rows])


def _but(words: Words, k: int) -> Words:
    return [w for at, w in enumerate(words) if at != k]


def _kept(words: Words, chosen: list[int]) -> Words:
    return [words[i] for i in sorted(chosen)]
