"""What may be hostile is made visible and escaped."""

from __future__ import annotations

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.draw import clean, esc, mark_word


@given(st.text())
def test_escaped_text_carries_no_markup_and_reads_back_as_the_clean_text(text: str) -> None:
    escaped = str(esc(text, 10_000))
    assert "<" not in escaped and ">" not in escaped and '"' not in escaped
    assert html.unescape(escaped) == clean(text, 10_000)


@given(st.text(st.characters(codec=None)))
def test_clean_text_has_no_hidden_character_and_can_be_encoded(text: str) -> None:
    cleaned = clean(text, 10_000)
    cleaned.encode("utf-8")
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not [c for c in cleaned if unicodedata.category(c) in hidden and c not in "\n\t"]


def test_a_direction_override_is_shown_not_obeyed() -> None:
    assert clean("abc\u202edcba") == "abc⟨U+202E⟩dcba"
    assert clean("zero\u200bwidth") == "zero⟨U+200B⟩width"


def test_a_megabyte_is_cut_and_the_cut_is_counted() -> None:
    cleaned = clean("x" * 1_000_000, 100)
    assert cleaned == "x" * 100 + " … [999,900 more characters]"


def test_accents_cannot_pile_up_without_end() -> None:
    assert clean("e" + "\u0301" * 9).count("⟨U+0301⟩") == 5


def test_a_word_is_marked_only_as_a_whole_word_in_any_case() -> None:
    marked = str(mark_word("Start the ART of <art>.", "art"))
    assert marked == "Start the <mark>ART</mark> of &lt;<mark>art</mark>&gt;."


@given(st.text(), st.text(max_size=20))
def test_marking_a_word_never_lets_markup_through(text: str, word: str) -> None:
    marked = str(mark_word(text, word, 10_000)).replace("<mark>", "").replace("</mark>", "")
    assert "<" not in marked
    assert html.unescape(marked) == clean(text, 10_000)


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_empty(value: object) -> None:
    assert clean(value) == ""
