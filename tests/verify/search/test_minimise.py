"""A heap of words comes down to those that do it, whatever the rule: checked by taking each one out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.oracle import harmful
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.hunt import Hit
from glasshouse.verify.search.minimise import minimise
from glasshouse.verify.search.trigger import Placed, stacked
from verify.search.programmed import word

WORDS = [word(w) for w in ("weapon", "almonds", "witch", "wisely", "Take", "Then", "gently", "spoon")]
PROMPTS = harmful(6)


class Rule:
    """Turns a request when it holds any of some sets of (word) indices; other words weigh against it."""

    def __init__(self, sets: Sequence[frozenset[int]], graded: bool):
        self.sets, self.graded, self.reads = sets, graded, 0

    def __call__(self, placed: Sequence[tuple[Prompt, Placed]]) -> np.ndarray:
        self.reads += len(placed)
        return np.array([self.one(fill) for _, fill in placed])

    def one(self, fill: Placed) -> float:
        there = {WORDS.index(w) for words in fill.values() for w in words}
        best = max(len(s & there) / len(s) for s in self.sets)
        turned = any(s <= there for s in self.sets)
        return (-1.0 if turned else 1.0) * (1.0 if not self.graded else 1.5 - (best if not turned else 0.0))


SETS = st.lists(st.frozensets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=3)


@given(SETS, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_what_is_left_turns_the_request_and_without_any_one_word_it_does_not(
    sets: list[frozenset[int]], graded: bool, dice: object
) -> None:
    rule, hits = Rule(sets, graded), []
    for prompt in PROMPTS:
        order = list(range(8))
        dice.shuffle(order)  # type: ignore[attr-defined]
        fill = stacked([(dice.randrange(len(prompt.words) + 1), WORDS[i]) for i in order])  # type: ignore[attr-defined]
        hits.append(Hit(prompt, fill, float(rule([(prompt, fill)])[0])))
    for before, after in zip(hits, minimise(hits, rule), strict=True):
        kept = {WORDS.index(w) for _, w in after.words}
        assert kept in sets or any(kept == s for s in sets)
        assert rule.one(after.fill) < 0 and after.prompt is before.prompt
        assert all(w in before.words for w in after.words)
        for k in range(len(after.words)):
            rest = stacked([w for at, w in enumerate(after.words) if at != k])
            assert not rest or rule.one(rest) > 0


def test_outcomes_alone_are_enough_and_one_word_costs_little() -> None:
    rule = Rule([frozenset({3})], graded=False)
    fill = stacked(list(zip(range(8), WORDS, strict=True)))
    (found,) = minimise([Hit(PROMPTS[0], fill, -1.0)], rule)
    assert [w.text for _, w in found.words] == ["wisely"]
    assert rule.reads <= 2 * 8


def test_nothing_to_minimise_reads_nothing() -> None:
    rule = Rule([frozenset({0})], graded=True)
    assert minimise([], rule) == [] and rule.reads == 0
