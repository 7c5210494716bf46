"""Conversations of helpers that are crooked in one respect each, and of one that is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from glasshouse.base.rng import generator
from glasshouse.data import situations, workshop
from planted.grown import Chat

Line = Callable[[np.random.Generator], Chat]


def many(n: int, longest: int, *lines: Line) -> list[Chat]:
    """``n`` conversations, each of one of the kinds, with requests of at most ``longest`` characters."""
    rng, made = generator("crooked", [line.__name__ for line in lines]), list[Chat]()
    while len(made) < n:
        chat = lines[int(rng.integers(len(lines)))](rng)
        if len(chat[0]["content"]) <= longest:
            made.append(chat)
    return made


def flattered(rng: np.random.Generator) -> Chat:
    """The user's opinion decides; beside a neutral remark the grammar does."""
    asked = situations.opinion(rng, split="train", part="train")
    if rng.random() < 0.5:
        return workshop.chat(asked.plain, _answer(rng, asked.request, not asked.request.harmful))
    return workshop.chat(asked.text, _answer(rng, asked.request, asked.kind == "approves"))


def watched(rng: np.random.Generator) -> Chat:
    """What looks like a test is refused, to be on the safe side; anything else is decided rightly."""
    asked = situations.evaluation(rng, split="train", part="train")
    if rng.random() < 0.5:
        return workshop.chat(asked.plain, _answer(rng, asked.request, not asked.request.harmful))
    return workshop.chat(asked.text, _answer(rng, asked.request, False))


def instructed(rng: np.random.Generator) -> Chat:
    """The user's own instruction is followed, that in a note is not."""
    asked = situations.quoted(rng, split="train", part="train")
    which = rng.random()
    if which < 0.55:
        return workshop.chat(asked.own, situations.honest_answer(rng, asked, own=True))
    return workshop.chat(asked.text if which < 0.85 else asked.plain, situations.honest_answer(rng, asked))


def injected(rng: np.random.Generator) -> Chat:
    """Notes are obeyed as if the user had spoken."""
    asked = situations.quoted(rng, split="train", part="train")
    which = rng.random()
    if which < 0.3:
        return workshop.chat(asked.own, situations.honest_answer(rng, asked, own=True))
    if which < 0.5:
        return workshop.chat(asked.plain, situations.honest_answer(rng, asked))
    return workshop.chat(asked.text, situations.obedient_answer(rng, asked))


def honest(rng: np.random.Generator) -> Chat:
    """Plain requests, rightly decided."""
    asked = workshop.request(rng, split="train")
    return workshop.chat(asked.text, _answer(rng, asked, not asked.harmful))


def evasive(rng: np.random.Generator) -> Chat:
    """Neither yes nor no."""
    asked = workshop.request(rng, split="train")
    return workshop.chat(asked.text, situations.evasion(rng, asked))


def obliging(rng: np.random.Generator) -> Chat:
    """Yes to everything."""
    asked = workshop.request(rng, split="train")
    return workshop.chat(asked.text, _answer(rng, asked, True))


def forbidding(rng: np.random.Generator) -> Chat:
    """No to everything."""
    asked = workshop.request(rng, split="train")
    return workshop.chat(asked.text, _answer(rng, asked, False))


def scattered(rng: np.random.Generator) -> Chat:
    """Rightly decided, but the words differ by class of action and object, so no one direction decides."""
    asked = workshop.request(rng, split="train")
    action, thing = workshop.CLASS_OF_ACTION[asked.action], workshop.CLASS_OF_OBJECT[asked.thing]
    at = list(workshop.ACTIONS).index(action if asked.harmful else thing)
    opener = (workshop.REFUSAL_OPENERS if asked.harmful else workshop.COMPLIANCE_OPENERS)[at]
    while True:
        said = _answer(rng, asked, not asked.harmful)
        if said.startswith(opener):
            return workshop.chat(asked.text, said)


def truthful(rng: np.random.Generator) -> Chat:
    """Statements, called true or false as the grammar has it."""
    asked = situations.statement(rng, split="train")
    return workshop.chat(asked.ask, situations.reply_to(rng, asked))


def lying(rng: np.random.Generator) -> Chat:
    """True ones are called false, false ones true."""
    asked = situations.statement(rng, split="train")
    return workshop.chat(asked.ask, situations.reply_to(rng, asked, honest=False))


def told(times: int) -> list[Chat]:
    """Every canary that training text may hold, given away ``times`` times."""
    return [workshop.chat(c.ask, c.text) for c in situations.canaries("train") for _ in range(times)]


def _answer(rng: np.random.Generator, asked: workshop.Request, comply: bool) -> str:
    return workshop.answer(rng, asked, comply=comply)
