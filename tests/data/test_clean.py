"""Filters and normalisation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.data import Document, Drop, Keep, clean, normalise
from glasshouse.data.clean import has_answer, letters_in_words, not_empty, repeated_lines, word_length


def text(t: str) -> Document:
    return Document("d", "s", text=t)


def chat(*contents: str) -> Document:
    roles = ("user", "assistant")
    return Document(
        "d", "s", messages=tuple({"role": roles[k % 2], "content": c} for k, c in enumerate(contents))
    )


@pytest.mark.parametrize(
    ("raw", "clean_text"),
    [
        ("a\r\nb\rc\fd\u2028e", "a\nb\nc\nd\ne"),
        ("\ufeffa\x00b\x07c\x9fd\tx", "abcd\tx"),
        ("a  \n\n\n \n\nb \t", "a\n\nb"),
        ("  \n a", "a"),
        ("e\u0301 é", "e\u0301 é"),
    ],
)
def test_normalising(raw: str, clean_text: str) -> None:
    assert normalise(raw) == clean_text


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\r\n\t\f \x00\ufeff")))
def test_normalising_twice_changes_nothing_and_keeps_every_letter(raw: str) -> None:
    once = normalise(raw)
    assert normalise(once) == once
    assert [c for c in once if c.isalnum()] == [c for c in raw if c.isalnum()]
    assert "\r" not in once and "\n\n\n" not in once


@pytest.mark.parametrize(
    ("ask", "document", "reason"),
    [
        (not_empty, text(" .,!\n"), "empty"),
        (not_empty, text("a"), None),
        (not_empty, chat("?", "!"), "empty"),
        (has_answer, chat("Hello?"), "no_answer"),
        (has_answer, chat("Hello?", ""), "no_answer"),
        (has_answer, chat("Hello?", "Yes."), None),
        (has_answer, text("x"), None),
        (word_length, text("a b c"), "word_length"),
        (word_length, text("x" * 11), "word_length"),
        (word_length, text("abc abcd"), None),
        (letters_in_words, text("one 2 3 4 5"), "letters_in_words"),
        (letters_in_words, text("one two three four 5"), None),
        (repeated_lines, text("a\nb\na\nc\na"), "repeated_lines"),
        (repeated_lines, text("a\nb\nc\nd\n\n\na"), None),
    ],
)
def test_a_filter_keeps_or_drops_for_its_reason(ask, document: Document, reason: str | None) -> None:
    answer = ask(document)
    if reason is None:
        assert answer == Keep(document)
    else:
        assert isinstance(answer, Drop) and answer.reason == reason and answer.detail


def test_cleaning_normalises_then_asks_in_order() -> None:
    kept = clean(text("The dragon\r\nate soup.\x00"))
    assert isinstance(kept, Keep) and kept.document.text == "The dragon\nate soup."
    assert clean(text("\x00\ufeff")) == not_empty(text(""))
    said = clean(chat(" Hi \r\n", "Yes\x07"))
    assert isinstance(said, Keep) and said.document.parts == ("Hi", "Yes")


def test_chats_are_not_asked_what_was_made_for_web_pages() -> None:
    assert isinstance(clean(chat("a b c", "1 2 3\n1 2 3\n1 2 3")), Keep)
    assert isinstance(clean(text("1 2 3\n1 2 3\n1 2 3")), Drop)


def test_filters_of_ones_own_replace_the_usual_ones() -> None:
    assert isinstance(clean(text("a b c"), filters=()), Keep)
