"""Readers: every good file is read, every bad one is named with place and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import DataError, UsageError
from glasshouse.data import Document, read_documents
from glasshouse.data.documents import parse_document

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def write(path: Path, *lines: str | bytes) -> Path:
    raw = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_texts_and_chats_are_read_in_order_with_their_keys(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name,
        '{"text": "one", "id": "x", "year": 1900}',
        "",
        json.dumps({"messages": CHAT}),
        '{"text": ""}',
    )
    first, chat, empty = read_documents(path)
    assert (first.id, first.text, first.source, dict(first.meta)) == ("x", "one", name, {"year": 1900})
    assert (chat.id, list(chat.messages or ()), chat.kind) == (f"{name}:3", CHAT, "chat")
    assert empty.text == "" and chat.parts == ("Hi", "Yes")


def test_a_text_file_is_one_document_and_a_folder_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "two\nlines")
    write(tmp_path / "a.jsonl", '{"text": "one"}')
    write(tmp_path / "c.pdf", b"\xff not ours")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "d.txt", b"\xef\xbb\xbfwith a mark")
    assert [(d.id, d.text) for d in read_documents(tmp_path)] == [
        ("a.jsonl:1", "one"),
        ("b.txt", "two\nlines"),
        ("sub/d.txt", "with a mark"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("3", "expected a JSON object, got int"),
        ('{"txt": "a"}', "found neither. Did you mean 'text'"),
        ('{"text": "a", "messages": []}', "found both"),
        ('{"text": 3}', "'text' must be a string, got int"),
        ('{"text": "a", "id": [1]}', "'id' must be text"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "exactly 'role' and 'content'"),
        ('{"messages": [{"role": "asistant", "content": "a"}]}', "Did you mean 'assistant'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "has the role"),
        ('{"messages": [{"role": "user", "content": null}]}', "needs a text as content, got NoneType"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "only be the first",
        ),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}', line)
    with pytest.raises(DataError, match=said) as caught:
        list(read_documents(path))
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_bytes_that_are_not_utf8_are_named_by_offset_with_the_remedy(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"text": "good"}', b'{"text": "caf\xe9"}')
    with pytest.raises(DataError, match=r"not UTF-8 at byte 30 \(0xe9\).*iconv -f CP1252 -t UTF-8"):
        list(read_documents(path))


@pytest.mark.parametrize("cut", [5, -4, -12])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.jsonl.gz", *(json.dumps({"text": str(k) * 50}) for k in range(500)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="damaged gzip"):
        list(read_documents(path))


def test_what_holds_no_document_is_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="corpus is empty"):
        list(read_documents(tmp_path))
    with pytest.raises(DataError, match="corpus is empty"):
        list(read_documents(write(tmp_path / "a.jsonl", "", "  ")))
    with pytest.raises(DataError, match="corpus is empty"):
        list(read_documents(write(tmp_path / "a.txt", "\n")))


def test_missing_and_unknown_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        list(read_documents(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="unknown kind of file"):
        list(read_documents(write(tmp_path / "a.csv", "x")))


def test_a_document_is_a_text_or_a_chat_never_both() -> None:
    with pytest.raises(DataError, match="not both"):
        Document("a", "s")
    with pytest.raises(DataError, match="not both"):
        Document("a", "s", text="x", messages=())


@given(
    st.text(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(json.dumps)
)
def test_no_line_crashes_the_parser(line: str) -> None:
    try:
        parse_document(line, "f:1", "f:1", "f")
    except DataError as error:
        assert str(error).startswith("f:1: ")
