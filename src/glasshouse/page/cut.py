"""How much of a long thing is shown, and the list of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How much the page shows of each kind of thing; texts in characters, the rest in items."""

    text: int = 900
    long_text: int = 2000
    examples: int = 6
    documents: int = 10
    shards: int = 40
    failures: int = 12
    checkpoints: int = 80
    constraints: int = 60
    samples: int = 24
    sources: int = 60
    tokens: int = 48
    layers: int = 64
    items: int = 40


# Tried in turn until the page fits; the last is small enough for anything.
LEVELS = (
    Limits(),
    Limits(400, 800, 4, 6, 24, 8, 40, 40, 12, 40, 32, 32, 24),
    Limits(120, 200, 2, 3, 12, 3, 12, 16, 4, 12, 24, 16, 12),
)


@dataclass
class Cuts:
    """Takes the first items of a list and remembers, for the reader, what it did not take."""

    limits: Limits
    notes: list[str] = field(default_factory=list)

    def first(self, items: Sequence[T], most: int, what: str) -> list[T]:
        """The first `most` of `items`; when there are more, a note that says how many."""
        if len(items) > most:
            self.notes.append(f"{what}: {most} of {len(items):,} shown.")
        return list(items[:most])
