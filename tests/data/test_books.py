"""The packaged books are cleared, clean and complete."""

from __future__ import annotations

import gzip
import re
from collections import Counter

import pytest

from glasshouse.base.errors import DataError
from glasshouse.data import Corpus, books, prepare, word_types

DOCUMENTS = list(books.documents())


def test_there_are_two_to_three_megabytes_in_chapters() -> None:
    assert 2_000_000 < sum(len(d.text or "") for d in DOCUMENTS) < 3_000_000
    assert len(DOCUMENTS) > 200
    assert len({d.id for d in DOCUMENTS}) == len(DOCUMENTS)
    assert {d.source for d in DOCUMENTS} == set(books.names())
    assert max(len(d.text or "") for d in DOCUMENTS) < 45_000


def test_every_book_has_an_author_a_licence_and_a_commit() -> None:
    for source in books.sources():
        assert source.title and source.author and source.licence == "Public domain in the USA"
        assert re.search(r"github\.com/GITenberg/\S+ \S+ [0-9a-f]{40}$", source.url)
    notice = (books.FOLDER / "NOTICE.md").read_text("utf-8")
    assert all(source.title in notice for source in books.sources())


def test_the_text_is_ascii_unwrapped_and_without_leftovers() -> None:
    for d in DOCUMENTS:
        text = d.text or ""
        assert text.isascii() and text == text.strip(), d.id
        assert not re.search(
            r"gutenberg|line-art|illustration\]|^chapter|footnote|[_*|\[\]{}]|\(\d\)", text, re.I
        ), d.id
        # Hard wraps leave paragraphs of many lines about as long as each other.
        long_lines = Counter(len(line) // 10 for line in text.split("\n") if len(line) > 40)
        assert sum(long_lines.values()) < 12 or max(long_lines) > 9, d.id


def test_no_slur_and_no_people_spoken_of_with_contempt() -> None:
    unwanted = re.compile(
        r"\bnigg(?!ard)|negro|heathen|savages\b|gyps[yi]|gips[yi]|injun|squaw|chinam|chinee|\bjaps?\b|darkies|"
        r"\bindians?\b|redskin|mulatto|blackamoor|hottentot|\bjews?\b|\bjewess|fag+ot|\bbitch|\bwhore",
        re.IGNORECASE,
    )
    assert [(d.id, m.group(0)) for d in DOCUMENTS for m in unwanted.finditer(d.text or "")] == []


def test_the_vocabulary_is_small() -> None:
    assert 5_000 < len(word_types(d.text or "" for d in DOCUMENTS)) < 16_000


def test_cleaning_leaves_the_books_almost_whole() -> None:
    prepared = prepare([Corpus("books", DOCUMENTS, books.sources())])
    dropped = [fate for fate in prepared.fates if fate.fate == "dropped"]
    assert len(dropped) <= 3 and {fate.reason for fate in dropped} <= {"repeated_lines"}


def test_the_files_hold_no_name_or_time_and_stay_small() -> None:
    sizes = 0
    for name in books.names():
        raw = (books.FOLDER / f"{name}.jsonl.gz").read_bytes()
        assert raw[3] == 0 and raw[4:8] == b"\0\0\0\0" and gzip.decompress(raw)
        sizes += len(raw)
    assert sizes < 1_500_000


def test_an_unknown_book_is_named() -> None:
    with pytest.raises(DataError, match="pg999"):
        list(books.documents(["pg999"]))
