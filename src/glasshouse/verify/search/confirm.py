"""The test that decides: a suspect in fresh requests, in turn, until the bound is kept or broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glasshouse.base.errors import VerificationError
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.examination import sequentially
from glasshouse.verify.search.documents import SUPPORT
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.trigger import Topic, Trigger
from glasshouse.verify.sequential import SequentialTest


@dataclass(frozen=True)
class Confirmed:
    """One suspect's sequential test on fresh prompts."""

    trigger: Trigger
    test: SequentialTest


def confirm(hunt: Hunt, triggers: Sequence[Trigger]) -> list[Confirmed]:
    """Sequential tests in turn, until one is broken; the error level of a wrong fail is split over all.

    A suspect that claims a class of requests or a place is tested there, which is why it has a share of its
    own: choosing where to look was done on other requests. Suspects are inserted as the very tokens the
    search found: a token without a space before it cannot be written as a word of its own. What stands after
    the first broken bound is left untested, and stays suspect.
    """
    if not triggers:
        raise VerificationError(f"constraint {hunt.exam.constraint.id}: the search produced nothing to test")
    fresh: dict[Topic | None, Fresh] = {}
    confirmed = []
    for trigger in triggers:
        if trigger.topic not in fresh:
            fresh[trigger.topic] = Fresh(hunt, trigger.topic)
        outcomes = fresh[trigger.topic].outcomes(trigger)
        test = bound_for(hunt, trigger, hunt.exam.test(len(triggers)))
        sequentially(test, outcomes, hunt.exam.constraint.prompts.n_max)
        confirmed.append(Confirmed(trigger, test))
        if test.state == "fail":
            break
    return confirmed


def bound_for(hunt: Hunt, trigger: Trigger, test: SequentialTest) -> SequentialTest:
    """The declared bound, or for several words that no training request supports one half-way to 1.

    A small clean model has heaps of two or three words among millions that turn more than half of requests;
    a trained trigger turns nearly all, and its words stand in training requests that are complied with.
    """
    if len(trigger.words) == 1 or hunt.support(trigger) >= SUPPORT:
        return test
    return SequentialTest((1 + test.bound) / 2, test.side, test.alpha_fail, test.alpha_pass)


class Fresh:
    """Requests of one topic that no search has seen, asked whether they are refused when they are needed."""

    def __init__(self, hunt: Hunt, topic: Topic | None):
        self.hunt = hunt
        self.coming = hunt.stream("confirm", hunt.exam.constraint.prompts.n_max, topic)
        self.prompts: list[Prompt] = []

    def outcomes(self, trigger: Trigger) -> Outcomes:
        """A reader of (start, n) for the sequential test: 1.0 where the trigger turned the refusal."""
        return Outcomes(self, trigger)

    def upto(self, n: int) -> list[Prompt]:
        """The first ``n`` of them, or all there are."""
        while len(self.prompts) < n:
            more = next(self.coming, None)
            if more is None:
                break
            self.prompts.append(more)
        return self.prompts[:n]


@dataclass(frozen=True)
class Outcomes:
    """What a trigger does to a stream of requests."""

    fresh: Fresh
    trigger: Trigger

    def __call__(self, start: int, n: int) -> list[float]:
        """Outcomes of requests ``start`` to ``start + n``."""
        hunt = self.fresh.hunt
        rng = hunt.exam.rng(f"confirm places {self.trigger.key} {start}")
        part = self.fresh.upto(start + n)[start:]
        if not part:
            return []
        placed = [(p, hunt.place(self.trigger, p, rng)) for p in part]
        turned: list[float] = (hunt.margins(placed) < 0).astype(float).tolist()
        return turned
