"""Cleaning: every filter is a pure function `Document -> Keep | Drop`, with a source for its threshold.

`clean` normalises first, then asks the filters in order; the first `Drop` decides. Conversations are only
normalised and asked whether they can teach anything: filters made for web pages would drop short answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glasshouse.data.documents import Document
from glasshouse.tokenizer import Message


@dataclass(frozen=True)
class Keep:
    """The document stays, perhaps normalised."""

    document: Document


@dataclass(frozen=True)
class Drop:
    """The document goes; `reason` is a short fixed word for counting, `detail` says why this one."""

    reason: str
    detail: str = ""


Filter = Callable[[Document], Keep | Drop]
NEWLINES = re.compile("\r\n|[\r\f\x0b\x85\u2028\u2029]")
# Unicode category Cc but tab and newline, byte order marks, and two code points that are not characters.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
BLANK_LINES = re.compile(r"\n{3,}")
TRAILING = re.compile(r"[ \t]+(?=\n|$)")


def normalise(text: str) -> str:
    """Return `text` with one kind of newline and without characters nobody can see.

    CRLF, CR, form feed, U+2028 and U+2029 become newlines; other control characters (but tab), byte order
    marks and U+FFFE/U+FFFF are removed; blanks before a newline go; at most one empty line stays; ends
    are stripped. Letters and their composition (NFC/NFD) are left as they are.
    """
    text = NEWLINES.sub("\n", text)
    return BLANK_LINES.sub("\n\n", TRAILING.sub("", INVISIBLE.sub("", text))).strip()


def not_empty(document: Document) -> Keep | Drop:
    """Drop a document without a letter or digit in any script."""
    if any(char.isalnum() for part in document.parts for char in part):
        return Keep(document)
    return Drop("empty", "no letter or digit")


def has_answer(document: Document) -> Keep | Drop:
    """Drop a conversation in which the assistant says nothing: it would add no weighted target."""
    if document.messages is None or any(m["role"] == "assistant" and m["content"] for m in document.messages):
        return Keep(document)
    return Drop("no_answer", "no message by the assistant")


def word_length(document: Document, *, at_least: float = 3.0, at_most: float = 10.0) -> Keep | Drop:
    """Drop text whose mean word length is not that of language (Gopher, Rae et al. 2021: 3 to 10)."""
    words = (document.text or "").split()
    mean = sum(map(len, words)) / len(words) if words else 0.0
    if at_least <= mean <= at_most:
        return Keep(document)
    return Drop("word_length", f"mean word length {mean:.1f}, expected {at_least:g} to {at_most:g}")


def letters_in_words(document: Document, *, at_least: float = 0.80) -> Keep | Drop:
    """Drop text in which fewer than 80% of words hold a letter (Gopher, Rae et al. 2021, A.1.1)."""
    words = (document.text or "").split()
    share = sum(any(c.isalpha() for c in word) for word in words) / len(words) if words else 0.0
    if share >= at_least:
        return Keep(document)
    return Drop("letters_in_words", f"{share:.0%} of words hold a letter, expected {at_least:.0%}")


def repeated_lines(document: Document, *, max_share: float = 0.30) -> Keep | Drop:
    """Drop text made of repeated lines (Gopher, Rae et al. 2021, A.1.1: duplicate line fraction 0.30).

    As there, a line's first appearance is not a repetition. Empty lines do not count.
    """
    lines = [line.strip() for line in (document.text or "").split("\n") if line.strip()]
    repeated = sum(n - 1 for n in Counter(lines).values())
    share = repeated / len(lines) if lines else 0.0
    if share <= max_share:
        return Keep(document)
    return Drop("repeated_lines", f"{share:.0%} of lines repeat an earlier one, at most {max_share:.0%}")


TEXT_FILTERS: tuple[Filter, ...] = (not_empty, word_length, letters_in_words, repeated_lines)
CHAT_FILTERS: tuple[Filter, ...] = (not_empty, has_answer)


def clean(document: Document, filters: Sequence[Filter] | None = None) -> Keep | Drop:
    """Normalise a document and ask the filters (by default those of its kind) in order."""
    if document.messages is None:
        document = replace(document, text=normalise(document.text or ""))
    else:
        messages = tuple(Message(role=m["role"], content=normalise(m["content"])) for m in document.messages)
        document = replace(document, messages=messages)
    for ask in filters if filters is not None else TEXT_FILTERS if document.kind == "text" else CHAT_FILTERS:
        answer = ask(document)
        if isinstance(answer, Drop):
            return answer
        document = answer.document
    return Keep(document)
