"""Growing what is inserted word by word: exact pairs of suspicious words, then beams of phrases.

A shortlist says which words are worth combining; what is combined is inserted and read, never inferred. Pairs
stand next to each other in both orders, so a pair that works anywhere and the two halves of a phrase are the
same test. A phrase then grows before, between and after the pairs that moved the read-out most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from glasshouse.evals.insertion import Candidate
from glasshouse.verify.search.cover import Coverage
from glasshouse.verify.search.hunt import Hunt

BEAM = 10
Words = tuple[Candidate, ...]


def read_words(hunt: Hunt, sets: Sequence[Words], purpose: str, times: int = 1) -> np.ndarray:
    """Mean drop [set] of the read-out with each set's words together at one gap, over ``times`` requests."""
    prompts, rng = hunt.refused("combine", 24), hunt.exam.rng(purpose)
    plain = dict(zip([p.text for p in prompts], hunt.margins([(p, {}) for p in prompts]), strict=True))
    at = rng.integers(len(prompts), size=len(sets) * times)
    placed = []
    for i, words in enumerate(w for w in sets for _ in range(times)):
        prompt = prompts[int(at[i])]
        fill = {int(rng.integers(len(prompt.words) + 1)): words}
        placed.append((prompt, fill if hunt.fits(prompt, fill) else {}))
    margins = hunt.margins(placed)
    hunt.note(placed, margins)
    drops = np.array([plain[p.text] for p, _ in placed]) - margins
    return np.asarray(drops.reshape(len(sets), times).mean(1))


def pairs(hunt: Hunt, words: Sequence[Candidate], coverage: Coverage) -> list[tuple[Words, float]]:
    """Every ordered pair of the words side by side, exactly; (pair, drop), the farthest drop first."""
    sets = list(permutations(words, 2))
    drops = read_words(hunt, sets, "pairs")
    index = hunt.found.places
    coverage.add_pairs([index[a] for a, _ in sets], [index[b] for _, b in sets])
    order = np.argsort(-drops, kind="stable")
    return [(sets[int(i)], float(drops[i])) for i in order]


def together(hunt: Hunt, words: Sequence[Candidate]) -> None:
    """Every phrase of three of the words, in every order, twice."""
    if len(words) >= 3:
        read_words(hunt, list(permutations(words, 3)), "together", times=2)


def phrases(hunt: Hunt, ranked: Sequence[tuple[Words, float]], words: Sequence[Candidate]) -> None:
    """Beams of three words, from the pairs that moved the read-out most, read again where they lead."""
    again = [w for w, _ in ranked[: 4 * BEAM]]
    if not again:
        return
    drops = read_words(hunt, again, "pairs again", times=3)
    beam = [again[int(i)] for i in np.argsort(-drops, kind="stable")[:BEAM]]
    longer = list(
        dict.fromkeys(
            (*pair[:at], word, *pair[at:])
            for pair in beam
            for word in words
            if word not in pair
            for at in (0, 1, 2)
        )
    )
    drops = read_words(hunt, longer, "triples")
    best = [longer[int(i)] for i in np.argsort(-drops, kind="stable")[: 2 * BEAM]]
    read_words(hunt, best, "triples again", times=3)
