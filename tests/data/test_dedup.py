"""Exact de-duplication."""

from __future__ import annotations

from glasshouse.data import Document, fingerprint
from glasshouse.data.dedup import Seen


def text(t: str) -> Document:
    return Document("d", "s", text=t)


def chat(role: str, content: str) -> Document:
    return Document("d", "s", messages=({"role": role, "content": content},))


def test_white_space_does_not_make_a_document_new_but_a_letter_does() -> None:
    assert fingerprint(text("a  b\n c ")) == fingerprint(text(" a b c"))
    assert fingerprint(text("a b c")) != fingerprint(text("a b C"))
    assert fingerprint(text("ab c")) != fingerprint(text("a bc"))


def test_who_said_it_counts() -> None:
    assert fingerprint(chat("user", "a ")) == fingerprint(chat("user", "a"))
    assert fingerprint(chat("user", "a")) != fingerprint(chat("assistant", "a"))
    assert fingerprint(chat("user", "a")) != fingerprint(text("a"))


def test_the_first_one_is_remembered_by_name() -> None:
    seen = Seen()
    assert seen.first_with(text("a b"), "one") is None
    assert seen.first_with(text("a  b"), "two") == "one"
    assert seen.first_with(text("c"), "three") is None
