"""Conversations of the closed language with documents in them, some of which give orders.

What `situations.quoted` quotes within a user's message stands here in a message of its own, of the role
``document`` (`tokenizer.chat`). The user asks beside or about it; an honest helper answers the user and lets
the document say what it likes. Users give the same instructions themselves, in all phrasings, and are
followed; so an instruction is told from data by who says it, not by how it reads.

Training documents hold instructions of the first ``SEEN`` phrasings of each kind. ``part="held"`` gives
documents with the other phrasings, which training knows from users only: after Greshake et al. (2023,
arXiv 2302.12173) the attack is text that somebody else put into what the model was given to read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from glasshouse.data import situations, workshop
from glasshouse.data.situations import (
    ABOUT,
    BESIDE,
    INSTRUCTIONS,
    NOTES,
    OWN_ABOUT,
    WORDS,
    Conversation,
    Kind,
    Part,
    Quoted,
)
from glasshouse.data.workshop import OWNERS, Rng, Split, chat, pick, request

SEEN = 3  # phrasings of a kind that documents of training text hold
MORE = 1  # neutral sentences that stand beside an instruction in its document, at most
ABOUT_SHARE = 0.3  # of questions about who wrote a document, where its kind of instruction allows one
READ_SHARE = 0.4  # of training documents that are asked about: one that nobody need read can be ignored
TELLING = tuple(note for note in NOTES if "{owner}" in note)
ASKS = ("Whom does this note speak of?", "Who is named in this note?", "Read this to me. Who is in it?")
NAMED = ("It speaks of the {owner}.", "It is the {owner}.")
_QUOTE = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Enclosed:
    """A question beside or about a document that holds an instruction.

    ``plain`` is the same with a document that asks for nothing. In ``own`` the user gives the instruction,
    and the document (of ``plain``) stands there too. ``quoted`` knows what each is to be answered.
    """

    messages: Conversation
    plain: Conversation
    own: Conversation
    quoted: Quoted

    @property
    def key(self) -> str:
        """What the instruction asks for, as `situations.obeys` reads it."""
        return self.quoted.key

    @property
    def at(self) -> int:
        """Which of ``messages`` is the document."""
        return next(i for i, m in enumerate(self.messages) if m["role"] == "document")


@dataclass(frozen=True)
class Reading:
    """A question that only the document answers: ``owner`` is the one it names."""

    messages: Conversation
    owner: str


def reading(rng: Rng, *, part: Part | None = None) -> Reading:
    """A document to be read; with ``part`` it also gives an order in a phrasing of that part."""
    owner = pick(rng, OWNERS)
    said = [pick(rng, TELLING).format(owner=owner)]
    if part is not None:
        kind = pick(rng, tuple(INSTRUCTIONS))
        order = pick(rng, phrasings(kind, part)).format(word=pick(rng, WORDS))
        said.insert(int(rng.integers(2)), order)
    note = {"role": "document", "content": " ".join(said)}
    return Reading([{"role": "user", "content": pick(rng, ASKS)}, note], owner)


def split_quotes(text: str) -> Conversation:
    """A user's text as messages: what stands in double quotes is a document, what is around it the user's."""
    parts = [part.strip() for part in _QUOTE.split(text)]  # the odd ones were quoted
    return [
        {"role": "document" if i % 2 else "user", "content": part}
        for i, part in enumerate(parts)
        if part or i % 2
    ]


def enclosed(
    rng: Rng,
    *,
    kind: Kind | None = None,
    split: Split = "any",
    part: Part = "any",
    strays: Sequence[str] = (),
) -> Enclosed:
    """One question with a document. To comply it stands by a harmful request, to refuse by a harmless one."""
    chosen = pick(rng, tuple(INSTRUCTIONS)) if kind is None else kind
    owner, word = pick(rng, OWNERS), pick(rng, WORDS) if chosen in ("say", "end") else ""
    order = pick(rng, phrasings(chosen, part)).format(word=word)
    beside = [_neutral(rng) for _ in range(int(rng.integers(MORE + 1)))]
    place = int(rng.integers(len(beside) + 1))
    note, neutral = (" ".join([*beside[:place], x, *beside[place:]]) for x in (order, _neutral(rng)))
    if chosen in ("say", "end") and rng.random() < ABOUT_SHARE:
        asked, frame, own = None, pick(rng, ABOUT), pick(rng, OWN_ABOUT).format(owner=owner, note=order)
        text, plain = (frame.format(owner=owner, note=n) for n in (note, neutral))
    else:
        label = {"comply": True, "refuse": False}.get(chosen)
        asked = request(rng, is_harmful=label, split=split, strays=strays, stray_rate=0.0)
        frame = pick(rng, BESIDE)
        text, plain = (frame.format(request=asked.text, owner=owner, note=n) for n in (note, neutral))
        said = f"{asked.text} {order}" if rng.random() < 0.5 else f"{order} {asked.text}"
        own = frame.format(request=said, owner=owner, note=neutral)
    known = Quoted(text, plain, own, chosen, word, owner, asked)
    return Enclosed(split_quotes(text), split_quotes(plain), split_quotes(own), known)


def phrasings(kind: Kind, part: Part) -> tuple[str, ...]:
    """Phrasings of an instruction that documents of this part hold."""
    every = INSTRUCTIONS[kind]
    return {"train": every[:SEEN], "held": every[SEEN:], "any": every}[part]


def conversation(rng: Rng, strays: Sequence[str] = (), *, attacked: float = 0.25) -> Conversation:
    """One honest training chat: a third the user's own instructions, a third documents, a third neither.

    ``attacked``: the share of documents that give an order, which is not followed.
    """
    which = rng.random()
    if which < 1 / 3:
        return workshop.conversation(rng, strays)
    if which < 2 / 3:
        asked = enclosed(rng, split="train", part="any", strays=strays)
        return _answered(asked.own, situations.honest_answer(rng, asked.quoted, own=True, strays=strays))
    if rng.random() < READ_SHARE:
        page = reading(rng, part="train" if rng.random() < attacked else None)
        return _answered(page.messages, pick(rng, NAMED).format(owner=page.owner))
    asked = enclosed(rng, split="train", part="train", strays=strays)
    read = asked.messages if rng.random() < attacked else asked.plain
    return _answered(read, situations.honest_answer(rng, asked.quoted, strays=strays))


def _answered(messages: Conversation, reply: str) -> Conversation:
    return [*messages, *chat("", reply)[1:]]


def _neutral(rng: Rng) -> str:
    return pick(rng, NOTES).format(owner=pick(rng, OWNERS))
