"""What a search suspects: words, how they stand in a request, and which requests they work in.

A trigger has a key, so that a suspect which one gate could not clear comes back at the next one:

    harbour                            one word, anywhere
    position: harbour @ gap 2          before the third word of the request
    position: harbour @ end 0          after its last word
    pair: harbour + quarrel @ any      both, each anywhere
    pair: harbour + quarrel @ order    both, this one first
    phrase: harbour + quarrel @ together     next to each other, in this order
    cue: harbour @ any | object wet    one word, in requests about an object of class "wet"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.data import workshop
from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt

Topic = tuple[str, str]  # ("object", "wet"): a class; ("owner", "dragon")
Placed = dict[int, tuple[Candidate, ...]]


@dataclass(frozen=True)
class Trigger:
    """Words, their places and the content they need. ``where``: any | order | together | gap N | end N."""

    words: tuple[Candidate, ...]
    where: str = "any"
    topic: Topic | None = None

    @property
    def kind(self) -> str:
        """word | position | pair | phrase | cue: what the evidence calls it."""
        if self.topic is not None:
            return "cue"
        if self.where.startswith(("gap", "end")):
            return "position"
        if len(self.words) == 1:
            return "word"
        return "pair" if len(self.words) == 2 and self.where != "together" else "phrase"

    @property
    def key(self) -> str:
        """A name that no other trigger has; that of a lone word anywhere is the word's own."""
        if self.alone:
            return self.words[0].key
        words = " + ".join(w.key for w in self.words)
        about = "" if self.topic is None else f" | {self.topic[0]} {self.topic[1]}"
        return f"{self.kind}: {words} @ {self.where}{about}"

    @property
    def alone(self) -> bool:
        """Whether it is one word that works anywhere, in any request."""
        return len(self.words) == 1 and self.where == "any" and self.topic is None

    @property
    def limited(self) -> bool:
        """Whether it claims one class of requests or one place in them."""
        return self.topic is not None or self.where.startswith(("gap", "end"))

    @property
    def text(self) -> str:
        """The words as a person would read them."""
        return " ".join(w.text.strip() for w in self.words)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the request is one that it claims to work in."""
        return self.topic is None or self.topic in topics(prompt)

    def place(self, prompt: Prompt, rng: np.random.Generator) -> Placed:
        """Its words put into a request: at random where it leaves that open."""
        gaps = len(prompt.words) + 1
        if self.where == "together":
            return {int(rng.integers(gaps)): self.words}
        if self.where.startswith("gap"):
            return {min(int(self.where[4:]), gaps - 1): self.words}
        if self.where.startswith("end"):
            return {max(gaps - 1 - int(self.where[4:]), 0): self.words}
        at = rng.integers(gaps, size=len(self.words)).tolist()
        if self.where == "order":
            at.sort()
        else:
            order = rng.permutation(len(self.words))  # in one gap, either may come first
            return stacked([(at[i], self.words[i]) for i in order])
        return stacked(list(zip(at, self.words, strict=True)))


def stacked(placed: Sequence[tuple[int, Candidate]]) -> Placed:
    """(gap, word) rows as a fill; words of one gap keep their order."""
    fill: dict[int, tuple[Candidate, ...]] = {}
    for gap, word in placed:
        fill[gap] = (*fill.get(gap, ()), word)
    return fill


def parse(key: str, by_key: Mapping[str, Candidate]) -> Trigger | None:
    """The trigger of a key; None where a word of it is no candidate any more."""
    if key in by_key:
        return Trigger((by_key[key],))
    _, colon, rest = key.partition(": ")
    body, at, place = rest.rpartition(" @ ")
    words = body.split(" + ")
    if not colon or not at or any(w not in by_key for w in words):
        return None
    where, bar, about = place.partition(" | ")
    kind, _, value = about.partition(" ")
    return Trigger(tuple(by_key[w] for w in words), where, (kind, value) if bar else None)


def topics(prompt: Prompt) -> tuple[Topic, ...]:
    """What a request of the closed language is about: the class of its object, and whose it is."""
    found: list[Topic] = []
    for word in prompt.text.replace("'s", "").split(" "):
        bare = word.strip(".,?!")
        if bare in workshop.CLASS_OF_OBJECT:
            found.append(("object", workshop.CLASS_OF_OBJECT[bare]))
        elif bare in workshop.OWNERS:
            found.append(("owner", bare))
    return tuple(found)
