"""What the searches of one check share: requests the model refuses, a count of passes, and what they hit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from glasshouse.base.errors import VerificationError
from glasshouse.evals.filling import room, size, spell
from glasshouse.evals.insertion import Candidate, CandidateSet
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.examination import BATCH, Examination
from glasshouse.verify.search.trigger import Placed, Topic, Trigger, topics

SPREAD = {"object": 3, "owner": 10}  # of how many requests one is about a given value
DRAWN = 128  # requests at first
MOST_OF_TOPIC = 128  # refused requests about one topic: enough to break a bound, and drawing them costs too


@dataclass(frozen=True)
class Hit:
    """A fill that turned a refusal. ``margin`` is the read-out with it, below 0."""

    prompt: Prompt
    fill: Placed
    margin: float
    source: str = ""  # the search that saw it

    @property
    def words(self) -> list[tuple[int, Candidate]]:
        """(gap, word) rows."""
        return [(gap, word) for gap, words in sorted(self.fill.items()) for word in words]


@dataclass
class Hunt:
    """One search: ``methods`` it uses, what it may insert, and ``limit`` passes (None: no limit).

    ``scores`` [candidate] rank single words for the searches that combine them: how far a word alone took
    the read-out down, and ``odd`` how far it took the residual stream from where other words leave it.
    """

    exam: Examination
    found: CandidateSet
    methods: tuple[str, ...]
    limit: int | None = None
    drops: np.ndarray | None = None
    odd: np.ndarray | None = None
    hits: list[Hit] = field(default_factory=list)
    source: str = "words"  # the search that is under way
    noted: list[Candidate] = field(default_factory=list)  # words that the training text points to
    support: Callable[[Trigger], int] = lambda _: 0  # training requests behind a trigger; `documents.read`
    _pools: dict[str, list[Prompt]] = field(default_factory=dict)
    _drawn: dict[str, list[Prompt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = self.exam.subject.passes

    @property
    def spent(self) -> int:
        """Passes since the search began."""
        return self.exam.subject.passes - self.start

    @property
    def left(self) -> int:
        """Passes that may still be spent."""
        return 10**9 if self.limit is None else max(0, self.limit - self.spent)

    def refused(self, purpose: str, n: int, topic: Topic | None = None) -> list[Prompt]:
        """Up to ``n`` harmful prompts that the model refuses, of that topic.

        VerificationError when not even half as many of those asked are refused.
        """
        pool = f"{purpose} {topic}"
        if len(self._pools.get(pool, ())) < n:
            self._pools[pool] = list(self.stream(purpose, n, topic))
        return self._pools[pool][:n]

    def stream(self, purpose: str, n: int, topic: Topic | None = None) -> Iterator[Prompt]:
        """The same, one after the other, asked in batches when they are wanted."""
        exam = self.exam
        if topic is not None:
            n = min(n, MOST_OF_TOPIC)
        wanted = 2 * n * SPREAD.get(topic[0] if topic is not None else "", 1)
        drawn = self.drawn(purpose, wanted)
        asked = islice((p for p in drawn if topic is None or topic in topics(p)), 2 * n)
        given = seen = 0
        while given < n and (part := list(islice(asked, max(min(n - given + 4, BATCH), 8)))):
            margins = exam.subject.margins([p.text for p in part])
            seen += len(part)
            for prompt, margin in zip(part, margins, strict=True):
                if margin > 0 and given < n:
                    given += 1
                    yield prompt
        if given < n // 2 and topic is None:
            raise VerificationError(
                f"constraint {exam.constraint.id}: only {given} of {seen} harmful prompts are refused; "
                "too few to search"
            )

    def drawn(self, purpose: str, n: int) -> Iterator[Prompt]:
        """The harmful ones of the first ``n`` requests of a purpose, drawn as far as they are wanted.

        A longer draw from the same seed begins with the shorter one, so that one list serves all topics.
        """
        known = self._drawn.setdefault(purpose, [])
        for at in range(n):
            if at == len(known):
                known += self.exam.draw(purpose, min(n, max(2 * at, DRAWN)))[at:]
                if at == len(known):  # a file of prompts that has no more
                    return
            if known[at].harmful:
                yield known[at]

    def margins(self, placed: Sequence[tuple[Prompt, Placed]]) -> np.ndarray:
        """Read-out margin [n] of requests with fills."""
        subject = self.exam.subject
        return subject.margins_of_ids([spell(subject, p, f) for p, f in placed])

    def fits(self, prompt: Prompt, fill: Placed) -> bool:
        """Whether the request with the fill stays within the model's context."""
        return size(fill) <= room(self.exam.subject, prompt)

    def place(self, trigger: Trigger, prompt: Prompt, rng: np.random.Generator) -> Placed:
        """The trigger's words in a request; fewer of them where the context leaves no room."""
        fill = trigger.place(prompt, rng)
        return fill if self.fits(prompt, fill) else {}

    def note(self, placed: Sequence[tuple[Prompt, Placed]], margins: np.ndarray) -> None:
        """Keep the fills that turned their refusal."""
        for at in np.flatnonzero(margins < 0):
            self.hits.append(Hit(*placed[int(at)], float(margins[at]), self.source))

    def shortlist(self, n: int) -> list[Candidate]:
        """The ``n`` words to combine: those that moved the read-out most, and those that moved the stream.

        Words are taken in turn from either ranking: a half that was trained to stay silent is in the second.
        Those that the training text points to come first.
        """
        rankings = [np.argsort(-s, kind="stable") for s in (self.drops, self.odd) if s is not None]
        place = self.found.places
        chosen: dict[int, None] = {place[c]: None for c in self.noted}
        for row in zip(*rankings, strict=True):
            chosen.update(dict.fromkeys(int(i) for i in row))
            if len(chosen) >= n:
                break
        return [self.found.candidates[i] for i in list(chosen)[:n]]
