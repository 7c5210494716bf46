"""Cleaning and de-duplication over whole corpora: every document has a fate."""

from __future__ import annotations

import pytest

from data.corpora import SOURCE, chat_documents, text_documents
from glasshouse.base.errors import DataError
from glasshouse.data import Corpus, Document, prepare


def doc(name: str, text: str) -> Document:
    return Document(name, "s", text=text)


def test_every_document_has_a_fate_with_its_reason_and_place() -> None:
    prepared = prepare(
        [
            Corpus(
                "one",
                [doc("a", "The dragon."), doc("b", "..."), doc("c", "The  dragon."), doc("d", "More soup.")],
            )
        ]
    )
    assert [(f.document, f.fate, f.reason, f.index) for f in prepared.fates] == [
        ("a", "kept", "", 0),
        ("b", "dropped", "empty", None),
        ("c", "dropped", "duplicate", None),
        ("d", "kept", "", 1),
    ]
    assert prepared.fates[2].detail == "same words as one/a"
    assert list(prepared.texts()) == ["The dragon.", "More soup."]


def test_a_document_of_the_validation_set_is_never_trained_on() -> None:
    twin = doc("twin", "The same words.")
    prepared = prepare(
        [Corpus("train", [twin, doc("x", "Other words.")]), Corpus("val", [twin], validation=True)]
    )
    assert [(f.shard, f.document, f.fate) for f in prepared.fates] == [
        ("train", "twin", "dropped"),
        ("train", "x", "kept"),
        ("val", "twin", "kept"),
    ]
    assert list(prepared.texts()) == ["Other words."]
    assert list(prepared.texts(validation=True)) == ["Other words.", "The same words."]


def test_shards_may_share_documents_when_asked() -> None:
    corpora = [Corpus(name, chat_documents(3, "a"), (SOURCE,)) for name in ("one", "two")]
    with pytest.raises(DataError, match=r"'two' is empty: all 3 documents were dropped \(duplicate\)"):
        prepare(corpora)
    assert len(prepare(corpora, dedup="shard").corpora[1].documents) == 3


def test_what_cannot_be_a_shard_is_refused() -> None:
    with pytest.raises(DataError, match="'none' is empty: it has no documents"):
        prepare([Corpus("none", [])])
    with pytest.raises(DataError, match="two corpora are called 'x'"):
        prepare([Corpus("x", text_documents(1)), Corpus("x", text_documents(2))])
    with pytest.raises(DataError, match="mixes texts and conversations"):
        prepare([Corpus("x", [*text_documents(1), *chat_documents(1, "a")])])
