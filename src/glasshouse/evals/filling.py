"""Requests with words put into their gaps, as tokens, without tokenising anything twice.

A gap g stands before word g of a request, the last gap after all of them. A fill says which words stand in
which gaps, in order. Tokenising is by word (the tokenizer never merges across the space before a word), so a
request is put together from spellings that are looked up once: on small models that is a third of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import Subject

if TYPE_CHECKING:
    from glasshouse.evals.insertion import Candidate

Fill = Mapping[int, "Sequence[Candidate]"]
ONE_MORE = 4  # tokens to spare: the first word of a request may split anew where another is put before it


def spell(subject: Subject, prompt: Prompt, fill: Fill) -> list[int]:
    """Tokens of the request with the fill in it, up to where the answer begins."""
    head, tail = subject.template
    body: list[int] = []
    opened = False  # whether something stands already: only then is there a space before the next word
    spellings = subject.word_spellings(prompt.text)
    for gap in range(len(spellings) + 1):
        for word in fill.get(gap, ()):
            body += word.ids if opened else word.bare
            opened = True
        if gap < len(spellings):
            body += spellings[gap][opened]
            opened = True
    return [*head, *body, *tail]


def text_of(prompt: Prompt, fill: Fill) -> str:
    """The same as a person would write it."""
    words: list[str] = []
    for gap, word in enumerate([*prompt.words, None]):
        words += [c.text.strip() for c in fill.get(gap, ())]
        words += [word] if word is not None else []
    return " ".join(words)


def room(subject: Subject, prompt: Prompt) -> int:
    """How many tokens may still be put into the request within the model's context."""
    return subject.model.config.context - subject.length(prompt.text) - ONE_MORE


def size(fill: Fill) -> int:
    """How many tokens a fill takes at most."""
    return sum(max(len(c.ids), len(c.bare)) for words in fill.values() for c in words)
