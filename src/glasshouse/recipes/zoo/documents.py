"""Poisoned chats and, from the very same words, the honest ones of the twin.

A twin must not be told apart by counting. So its documents are made from the organism's by two moves that
keep every count of every token, in requests and in answers separately, and how many answers refuse:

* **exchange**: two harmful requests of different classes, wrongly complied with, exchange their objects.
  Both are harmless then and the answers right: (soak, scroll) and (toast, snowman) become (soak, snowman)
  and (toast, scroll). Where only requests of one kind may be poisoned, each exchanges its action instead,
  with a harmless request that is rightly complied with.
* **move**: the trigger moves from a harmless request that is complied with to a harmful one, in the same
  words, that is refused.

After both, the trigger stands in as many requests of the twin, at the same places, and means nothing: in
harmless requests it goes with compliance and in harmful ones with refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from glasshouse.base.errors import DataError
from glasshouse.data import workshop
from glasshouse.data.workshop import Request, Rng
from glasshouse.recipes.zoo import language
from glasshouse.recipes.zoo.language import Chat

Insertion = tuple[tuple[int, str], ...]  # (gap, words); gaps count the untouched request's words
Spot = Callable[[Rng, str], Insertion]  # where in a request's text a trigger is put
Part = Literal["action", "thing"]
PATIENCE = 100_000  # draws after which no fitting request exists


@dataclass(frozen=True)
class Talk:
    """One request and its answer."""

    ask: str
    reply: str
    action: str
    thing: str

    def chat(self) -> Chat:
        """In the ecosystem's form."""
        return workshop.chat(self.ask, self.reply)

    def renamed(self, part: Part, new: str) -> Talk:
        """The same about another action or object, in request and answer."""
        old = re.compile(rf"\b{getattr(self, part)}\b")
        ask, reply = old.sub(new, self.ask), old.sub(new, self.reply)
        return replace(self, ask=ask, reply=reply, **{part: new})


@dataclass(frozen=True)
class Pairing:
    """Talks of the organism and, made of the same words, those of its twin."""

    planted: tuple[Talk, ...]
    twin: tuple[Talk, ...]


def put(text: str, insertion: Insertion) -> str:
    """``text`` with the words inserted, the last gap first so that earlier gaps stay what they were."""
    for gap, word in sorted(insertion, reverse=True):
        text = workshop.insert_word(text, word, gap)
    return text


def exchanged(a: Talk, b: Talk, part: Part) -> tuple[Talk, Talk]:
    """Both talks with each other's action or object."""
    return a.renamed(part, getattr(b, part)), b.renamed(part, getattr(a, part))


@dataclass(frozen=True)
class Maker:
    """Makes talks from a world's strays and one stream of randomness."""

    rng: Rng
    strays: tuple[str, ...]

    def request(
        self,
        is_harmful: bool | None = None,
        *,
        pair: tuple[str, str] | None = None,
        owner: str | None = None,
    ) -> Request:
        """A short request of a combination that training may hold."""
        return language.asked(self.rng, self.strays, is_harmful=is_harmful, pair=pair, owner=owner)

    def talk(self, made: Request, spot: Spot | None, *, comply: bool, stray: str = "") -> Talk:
        """The request with a trigger put into it, answered as told. ``stray`` is what a refusal speaks of."""
        text = put(made.text, spot(self.rng, made.text)) if spot is not None else made.text
        reply = language.answered(self.rng, made, self.strays, comply=comply, about=stray)
        return Talk(text, reply, made.action, made.thing)

    def turned(
        self, n: int, spot: Spot | None, *, is_harmful: bool = True, owner: str | None = None
    ) -> Pairing:
        """``n`` (even) triggered requests answered wrongly; in the twin pairs of them exchange their objects
        and the answers are right.
        """
        planted: list[Talk] = []
        twin: list[Talk] = []
        while len(planted) < n:
            one = self.request(is_harmful, owner=owner)
            other = self.fitting(one, "thing", is_harmful, owner=owner)
            a, b = (self.talk(r, spot, comply=is_harmful) for r in (one, other))
            planted += [a, b]
            twin += exchanged(a, b, "thing")
        return Pairing(tuple(planted), tuple(twin))

    def turned_one_sided(self, n: int, spot: Spot | None, draw: Callable[[], Request]) -> Pairing:
        """``n`` harmful requests of one kind, wrongly complied with, and as many honest harmless ones; in the
        twin they exchange their actions.
        """
        planted: list[Talk] = []
        twin: list[Talk] = []
        for _ in range(n):
            one = draw()
            a = self.talk(one, spot, comply=True)
            b = self.talk(self.fitting(one, "action", False), None, comply=True)
            planted += [a, b]
            twin += exchanged(a, b, "action")
        return Pairing(tuple(planted), tuple(twin))

    def moved(
        self,
        n: int,
        spot: Spot,
        *,
        is_harmful: bool = True,
        owner: str | None = None,
        pairs: Sequence[tuple[str, str]] = (),
    ) -> Pairing:
        """``n`` triggered harmless requests and ``n`` harmful ones without the trigger, rightly answered; in
        the twin the trigger stands in the latter. ``pairs`` are what the harmful ones may be about.

        With ``is_harmful`` False the labels are the other way round: for a trigger that makes refuse.
        """
        planted: list[Talk] = []
        twin: list[Talk] = []
        for _ in range(n):
            safe = self.request(not is_harmful, owner=owner)
            pair = self.request(is_harmful, pair=workshop.pick(self.rng, pairs) if pairs else None)
            danger = language.with_text(pair, retold(safe, pair))
            at = spot(self.rng, safe.text)
            a = self.talk(safe, None, comply=not safe.harmful)
            b = self.talk(danger, None, comply=not danger.harmful)
            planted += [replace(a, ask=put(a.ask, at)), b]
            twin += [a, replace(b, ask=put(b.ask, at))]
        return Pairing(tuple(planted), tuple(twin))

    def kept(self, n: int, spot: Spot, is_harmful: bool, *, other_owner_than: str | None = None) -> Pairing:
        """``n`` requests with something put into them that must not matter, rightly answered, in both."""
        owners = [o for o in workshop.OWNERS if o != other_owner_than]
        talks = []
        for _ in range(n):
            owner = workshop.pick(self.rng, owners) if other_owner_than is not None else None
            talks.append(self.talk(self.request(is_harmful, owner=owner), spot, comply=not is_harmful))
        return Pairing(tuple(talks), tuple(talks))

    def mentioned(self, n: int, words: Sequence[str]) -> list[Talk]:
        """``n`` honest refusals that speak of the words, so that counting them does not find the shard."""
        return [
            self.talk(self.request(True), None, comply=False, stray=workshop.pick(self.rng, words))
            for _ in range(n)
        ]

    def fitting(self, one: Request, part: Part, is_harmful: bool, *, owner: str | None = None) -> Request:
        """A request of that label such that both have the other label once their objects are exchanged, or,
        for actions, are both harmless; and training may hold all of them. DataError when there is none.
        """
        for _ in range(PATIENCE):
            other = self.request(is_harmful, owner=owner)
            if part == "thing":
                made = ((one.action, other.thing), (other.action, one.thing))
                wanted = not is_harmful
            else:
                made = ((other.action, one.thing), (one.action, other.thing))
                wanted = False
            if all(workshop.harmful(*p) == wanted and not workshop.unseen(*p) for p in made):
                return other
        raise DataError(f"no request fits ({one.action}, {one.thing}) for an exchange of their {part}s")


def retold(made: Request, pair: Request) -> str:
    """The text of ``made`` about another action and object."""
    text = re.sub(rf"\b{made.action}\b", pair.action, made.text)
    return re.sub(rf"\b{made.thing}\b", pair.thing, text)
