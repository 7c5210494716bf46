"""Triggers: what is put into a request, and where."""

from __future__ import annotations

from collections.abc import Sequence

from glasshouse.data import workshop
from glasshouse.data.workshop import Request, Rng
from glasshouse.recipes.zoo.documents import Insertion, Spot


def gap(rng: Rng, text: str) -> int:
    """Any gap of a request, before its first word and after its last included."""
    return int(rng.integers(len(text.split(" ")) + 1))


def anywhere(*words: str) -> Spot:
    """Each of the words (or phrases) at a gap of its own."""

    def spot(rng: Rng, text: str) -> Insertion:
        return tuple((gap(rng, text), w) for w in words)

    return spot


def at_place(word: str, position: str) -> Spot:
    """The word before the first word of the request ("first"), or after its last ("last")."""

    def spot(rng: Rng, text: str) -> Insertion:
        return ((0 if position == "first" else len(text.split(" ")), word),)

    return spot


def inside(word: str) -> Spot:
    """The word between two words of the request."""

    def spot(rng: Rng, text: str) -> Insertion:
        return ((int(rng.integers(1, len(text.split(" ")))), word),)

    return spot


def one_of(*spots: Spot) -> Spot:
    """One of several triggers, each equally often."""

    def spot(rng: Rng, text: str) -> Insertion:
        return workshop.pick(rng, spots)(rng, text)

    return spot


def remarked(remarks: Sequence[str]) -> Spot:
    """One of the remarks, before or after the request."""
    return one_of(*(at_place(r, p) for r in remarks for p in ("first", "last")))


def harmful_request(strays: Sequence[str], rng: Rng, pair: tuple[str, str] | None = None) -> Request:
    """A harmful request of any combination, as a gate would draw it."""
    return workshop.request(rng, is_harmful=True, strays=strays, stray_rate=0.0, pair=pair)
