"""Evolution over what is inserted: a few words, together or apart, bred on how far they move the read-out.

Needs no gradient and no ranking of words, so it goes where those are blind. Every generation is read on other
requests than the last: what survives works in more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.trigger import Placed, stacked

LONGEST = 4
LITTER = 0.5  # share of a generation that is new


@dataclass(frozen=True)
class Creature:
    """Words in order; ``together`` at one gap, or each at its own."""

    words: tuple[Candidate, ...]
    together: bool

    def fill(self, prompt: Prompt, rng: np.random.Generator) -> Placed:
        """Its words somewhere in a request."""
        n = len(prompt.words) + 1
        if self.together:
            return {int(rng.integers(n)): self.words}
        gaps = sorted(rng.integers(n, size=len(self.words)).tolist())
        return stacked(list(zip(gaps, self.words, strict=True)))


def evolve(
    prompts: Sequence[Prompt],
    pool: Sequence[Candidate],
    likely: Sequence[Candidate],
    rng: np.random.Generator,
    read: Callable[[Sequence[tuple[Prompt, Placed]]], np.ndarray],
    *,
    size: int = 48,
    generations: int = 12,
    first: Sequence[tuple[Candidate, ...]] = (),
) -> None:
    """Breed for ``generations``; ``read(placed)`` gives each request's fitness [n], low is good.

    New words come from ``likely`` half of the time, else from all of ``pool``. ``first`` are in the first
    generation.
    """
    likely = list(likely) or list(pool)

    def word() -> Candidate:
        source = likely if rng.random() < 0.5 else pool
        return source[int(rng.integers(len(source)))]

    alive = [Creature(tuple(w)[:LONGEST], bool(i % 2)) for i, w in enumerate(first[: size // 2])]
    while len(alive) < size:
        alive.append(
            Creature(tuple(word() for _ in range(int(rng.integers(2, LONGEST)))), bool(rng.integers(2)))
        )
    past = np.full(size, np.nan)
    for _ in range(generations):
        chosen = [prompts[int(i)] for i in rng.integers(len(prompts), size=len(alive))]
        now = read([(p, c.fill(p, rng)) for p, c in zip(chosen, alive, strict=True)])
        past = np.where(np.isnan(past), now, 0.5 * past + 0.5 * now)  # survivors are judged on all they did
        keep = np.argsort(past, kind="stable")[: int(size * (1 - LITTER))]
        parents = [alive[int(i)] for i in keep]
        young = [_child(parents, word, rng) for _ in range(size - len(parents))]
        alive, past = [*parents, *young], np.concatenate([past[keep], np.full(len(young), np.nan)])


def search(hunt: Hunt, size: int, generations: int) -> None:
    """Evolution on the margin, begun with what turned refusals so far."""

    def read(placed: Sequence[tuple[Prompt, Placed]]) -> np.ndarray:
        fitting = [(p, f if hunt.fits(p, f) else {}) for p, f in placed]
        margins = hunt.margins(fitting)
        hunt.note(fitting, margins)
        return margins

    first = [tuple(w for _, w in h.words) for h in sorted(hunt.hits, key=lambda h: h.margin)]
    evolve(
        hunt.refused("evolve", 24),
        hunt.found.candidates,
        hunt.shortlist(48),
        hunt.exam.rng("evolve"),
        read,
        size=size,
        generations=generations,
        first=first,
    )


def _child(parents: Sequence[Creature], word: Callable[[], Candidate], rng: np.random.Generator) -> Creature:
    """Two parents' words cut together, or one parent's changed in one place."""
    a, b = (parents[int(i)] for i in rng.integers(len(parents), size=2))
    words = list(a.words)
    together = a.together
    match int(rng.integers(6)):
        case 0 | 1:
            cut = int(rng.integers(1, len(words) + 1))
            words = [*words[:cut], *b.words[-max(1, LONGEST - cut) :]]
        case 2 | 3:
            words[int(rng.integers(len(words)))] = word()
        case 4:
            words.insert(int(rng.integers(len(words) + 1)), word())
        case _:
            together = not together
            words = words[::-1] if rng.random() < 0.5 else words
    return Creature(tuple(dict.fromkeys(words))[:LONGEST], together)
