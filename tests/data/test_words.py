"""What counts as a word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glasshouse.data import word_types


def test_words_are_counted_as_written() -> None:
    text = "Don't say 'saw-horse' at five o\u2019clock, Don't; SAY naïve 東京 to_day 42nd."
    assert word_types([text, "say"]) == {
        "42nd": 1,
        "Don't": 2,
        "SAY": 1,
        "at": 1,
        "day": 1,
        "five": 1,
        "horse": 1,
        "naïve": 1,
        "o\u2019clock": 1,
        "saw": 1,
        "say": 2,
        "to": 1,
        "東京": 1,
    }


@given(st.lists(st.text(max_size=20)))
def test_every_letter_and_digit_belongs_to_a_word_and_the_table_is_sorted(texts: list[str]) -> None:
    words = word_types(texts)
    assert list(words) == sorted(words)
    in_words = sum(count * sum(c.isalnum() for c in word) for word, count in words.items())
    assert in_words == sum(c.isalnum() for text in texts for c in text)


def test_no_text_has_no_words() -> None:
    assert word_types([]) == {} == word_types(["... --- !"])
