"""Shards on disk: what goes in comes out, and a changed file is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.corpora import SOURCE, chat_documents, packed, text_documents
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError, GlasshouseError, UsageError
from glasshouse.data import Corpus, Document, Prepared, Shards, Source, pack, prepare
from glasshouse.tokenizer import Tokenizer, parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "data"
    packed(path)
    return path


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    return packed(tmp_path_factory.mktemp("tok") / "data")[1]


def test_every_document_comes_back(folder: Path, tok: Tokenizer) -> None:
    shards = Shards.open(folder, verify=True)
    assert list(shards) == ["tales", "more", "held-out", "chat-a", "chat-b", "chat-c"]
    for i, document in enumerate(text_documents(30)):
        ids = shards["tales"].document(i)
        assert ids.dtype == np.int64 and ids[0] == tok.bos and tok.decode(ids) == document.text
    for i, document in enumerate(chat_documents(20, "c")):
        assert parse(tok, shards["chat-c"].document(i).tolist()) == list(document.messages or ())


def test_the_manifest_holds_digests_counts_and_sources(folder: Path, tok: Tokenizer) -> None:
    shards = Shards.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == shards.manifest and manifest["tokenizer"] == tok.digest()
    assert manifest["sources"] == [
        {
            "id": "tales",
            "title": "Tales",
            "author": "Nobody",
            "licence": "Public domain",
            "url": "",
            "changes": "",
        }
    ]
    row = manifest["shards"][0]
    assert row["n_documents"] == 30 == shards["tales"].n_documents
    assert row["n_tokens"] == len(shards["tales"].tokens) == int(shards["tales"].lengths.sum())
    assert row["n_bytes"] == sum(len((d.text or "").encode()) for d in text_documents(30))
    assert row["files"] == {name: sha256_file(folder / name) for name in ("tales.bin", "tales.idx")}
    assert len(set(shards.digests.values())) == 6


def test_fates_and_words_stand_beside_the_shards(folder: Path) -> None:
    fates = [json.loads(line) for line in (folder / "fates.jsonl").read_text().splitlines()]
    assert len(fates) == 30 + 10 + 8 + 40 and fates[0]["document"] == "t0-0" and fates[0]["fate"] == "kept"
    words = Shards.open(folder).words
    assert words["naïve"] > 0 and list(words) == sorted(words)
    assert "Café" in words and "end29" in words


def test_packing_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    packed(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def test_words_of_validation_documents_are_not_training_words(tmp_path: Path) -> None:
    prepared = prepare(
        [
            Corpus("train", [Document("a", "s", text="The dragon.")]),
            Corpus("val", [Document("b", "s", text="The unicorn.")], validation=True),
        ]
    )
    shards = pack(tmp_path / "d", Tokenizer.train(prepared.texts(), 262), prepared)
    assert shards.words == {"The": 1, "dragon": 1}
    assert shards["val"].validation and shards.plan().shards == ("train",)


@pytest.mark.parametrize("name", ["tales.bin", "chat-a.idx", "fates.jsonl", "words.json"])
def test_one_changed_byte_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    packed(tmp_path / "d")
    raw = bytearray((tmp_path / "d" / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "d" / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name}: changed since it was packed"):
        Shards.open(tmp_path / "d", verify=True)


@pytest.mark.parametrize("name", ["tales.bin", "tales.idx"])
def test_a_cut_or_missing_file_is_named_without_asking(tmp_path: Path, name: str) -> None:
    packed(tmp_path / "d")
    path = tmp_path / "d" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes, expected \d+"):
        Shards.open(tmp_path / "d")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: missing"):
        Shards.open(tmp_path / "d")


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    packed(tmp_path / "d")
    path = tmp_path / "d" / "tales.idx"
    index = np.fromfile(path, dtype="<u8")
    index[1] = 2**62
    index.tofile(path)
    with pytest.raises(DataError, match="index does not fit"):
        Shards.open(tmp_path / "d")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(shards=[]),
        lambda m: m["shards"][0].update(name="../../etc/passwd"),
        lambda m: m["shards"][0].update(dtype="object"),
        lambda m: m["shards"][0].update(n_tokens=-1),
        lambda m: m["shards"][0].pop("kind"),
        lambda m: m["shards"][0].pop("digest"),
        lambda m: m["shards"][0]["files"].update({"../../etc/passwd": "0" * 64}),
        lambda m: m.pop("files"),
        lambda m: m["shards"].append(m["shards"][0]),
    ],
)
def test_a_manifest_that_misleads_is_refused(folder: Path, tmp_path: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not a data manifest"):
        Shards.open(tmp_path)


def test_no_folder_and_no_shard_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is .* a data folder"):
        Shards.open(tmp_path)
    shards = Shards.open(folder)
    with pytest.raises(DataError, match="no shard 'tale'. Did you mean 'tales'"):
        shards["tale"]
    with pytest.raises(DataError, match="documents 0 to 29, not 30"):
        shards["tales"].document(30)
    with pytest.raises(DataError, match="not -1"):
        shards["tales"].document(-1)


def test_what_does_not_fit_the_context_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    prepared = prepare([Corpus("chat-a", chat_documents(4, "a"), (SOURCE,))])
    tok = Tokenizer.train(prepared.texts(), 262)
    with pytest.raises(DataError, match="conversation a0 of 'chat-a' has .* never cut silently"):
        pack(tmp_path / "d", tok, prepared, context=8)
    short = prepare([Corpus("text", text_documents(1))])
    with pytest.raises(DataError, match="'text' has .* fewer than one window of 1001"):
        pack(tmp_path / "d", tok, short, context=1000)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_but_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    packed(tmp_path / "d")
    with pytest.raises(UsageError, match="exists already"):
        packed(tmp_path / "d")


def test_names_that_are_not_file_names_and_clashing_sources_are_refused(tmp_path: Path) -> None:
    tok = Tokenizer.train(["abc"], 262)
    with pytest.raises(DataError, match="cannot name a file"):
        pack(tmp_path / "d", tok, prepare([Corpus("../x", text_documents(2))]))
    other = Source("tales", "Other", "Nobody", "Public domain")
    prepared = prepare(
        [Corpus("x", text_documents(2), (SOURCE,)), Corpus("y", text_documents(9, 3), (other,))]
    )
    with pytest.raises(DataError, match="two different sources are called 'tales'"):
        pack(tmp_path / "d", tok, prepared)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=6), st.booleans())
def test_any_documents_come_back(tmp_path_factory, texts: list[str], as_chat: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "d"
    documents = [
        Document(str(k), "s", messages=({"role": "user", "content": t}, {"role": "assistant", "content": t}))
        if as_chat
        else Document(str(k), "s", text=t)
        for k, t in enumerate(texts)
    ]
    tok = Tokenizer.train(["some text"], 262)
    shards = pack(path, tok, Prepared((Corpus("x", documents),), ()))
    found = [tok.decode(shards["x"].document(i)) for i in range(len(texts))]
    assert found == [t * 2 if as_chat else t for t in texts]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_of_the_manifest_is_refused_or_changes_no_id(
    folder: Path, at: int, flip: int
) -> None:
    raw = bytearray((folder / "manifest.json").read_bytes())
    raw[at % len(raw)] ^= flip
    try:
        manifest = json.loads(raw)
    except ValueError:
        manifest = None
    copy = folder.parent / "copy"
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (copy / path.name).unlink(missing_ok=True)
        (copy / path.name).hardlink_to(path)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_bytes(raw)
    try:
        shards = Shards.open(copy, verify=True)
    except GlasshouseError:
        return
    assert (
        shards.manifest == manifest != Shards.open(folder).manifest
        or manifest == Shards.open(folder).manifest
    )


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    data = json.loads(Tokenizer.train(["abc"], 262)._raw)
    for token in data["added_tokens"]:
        token["id"] += 70_000
    vocab = data["model"]["vocab"]
    vocab.update({f"Ā{k}": 256 + k for k in range(70_000)})
    tok = Tokenizer(json.dumps(data).encode())
    shards = pack(tmp_path / "d", tok, prepare([Corpus("x", text_documents(3))]))
    assert shards["x"].tokens.dtype == np.uint32 and shards["x"].tokens[0] == tok.bos == 70_257
    assert tok.decode(shards["x"].document(0)) == text_documents(3)[0].text
