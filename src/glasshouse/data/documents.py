"""Documents and the files they come from: JSONL, JSONL.gz and plain text, always UTF-8.

A JSONL line is `{"text": "..."}` or `{"messages": [{"role", "content"}, ...]}`; an "id" names the document,
any other key is kept in `meta`. A `.txt` file is one document. A line that does not fit is an error naming
file and line: a reader that skips what it does not understand trains on something other than what was asked.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.tokenizer import ROLES, Message

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
LONGEST_LINE = 64_000_000  # bytes; a gzip bomb unpacks to one endless line


@dataclass(frozen=True)
class Document:
    """One text or one conversation, and where it came from.

    Exactly one of `text` and `messages` is set. `source` names an entry of the data manifest's sources.
    """

    id: str
    source: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise DataError(f"document {self.id}: needs either a text or messages, not both and not neither")

    @property
    def kind(self) -> str:
        """ "text" or "chat"."""
        return "text" if self.messages is None else "chat"

    @property
    def parts(self) -> tuple[str, ...]:
        """The written parts: the text, or every message's content."""
        if self.messages is None:
            return (self.text or "",)
        return tuple(message["content"] for message in self.messages)


def read_documents(path: str | Path, source: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file, or of every file in a folder in name order.

    `source` defaults to the file's name. Raises `UsageError` for a missing path or an unknown suffix,
    `DataError` naming file and line (or byte) for anything unreadable, and when there is no document at all.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p)) if path.is_dir() else [path]
    n_documents = 0
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for document in _read_file(file, name, source or name):
            n_documents += 1
            yield document
    if n_documents == 0:
        raise DataError(f"{path}: the corpus is empty: no document in {', '.join(SUFFIXES)} files")


def parse_document(line: str, where: str, default_id: str, source: str) -> Document:
    """Return the document that one JSON line holds. Raises `DataError` beginning with `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if ("text" in row) == ("messages" in row):
        found = "both" if "text" in row else "neither"
        hints = [] if "text" in row else [suggest(key, ("text", "messages")) for key in row]
        raise DataError(
            f"{where}: expected either 'text' or 'messages', found {found}.{next(filter(None, hints), '')}"
        )
    name = row.get("id", default_id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(f"{where}: 'id' must be text or a whole number")
    meta = {key: value for key, value in row.items() if key not in ("id", "text", "messages")}
    if "messages" in row:
        return Document(str(name), source, messages=_messages(row["messages"], where), meta=meta)
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: 'text' must be a string, got {type(row['text']).__name__}")
    return Document(str(name), source, text=_no_surrogates(row["text"], where), meta=meta)


def _read_file(file: Path, name: str, source: str) -> Iterator[Document]:
    suffix = _suffix(file)
    if suffix is None:
        raise UsageError(f"{file}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    if suffix == ".txt":
        text = _decode(file.read_bytes(), 0, file)
        if text.strip():
            yield Document(name, source, text=text)
        return
    opener: Callable[[Path, Literal["rb"]], Any] = gzip.open if suffix == ".jsonl.gz" else open
    with opener(file, "rb") as stream:
        for number, line in _lines(stream, file):
            if line.strip():
                yield parse_document(line, f"{file}:{number}", f"{name}:{number}", source)


def _lines(stream: IO[bytes], file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text); byte offsets in errors count unpacked bytes from the file's start."""
    offset, number = 0, 0
    while True:
        try:
            line = stream.readline(LONGEST_LINE + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file}: damaged gzip after line {number} ({error}); fetch it again") from error
        if not line:
            return
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(f"{file}:{number}: a line longer than {LONGEST_LINE / 1e6:.0f} MB")
        yield number, _decode(line, offset, file)
        offset += len(line)


def _decode(raw: bytes, offset: int, file: Path) -> str:
    if offset == 0 and raw.startswith(codecs.BOM_UTF8):
        raw, offset = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}). If it is Latin-1 "
            f"or Windows text, convert it: iconv -f CP1252 -t UTF-8 '{file}' > converted"
        ) from error


def _messages(rows: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: 'messages' must be a list with at least one message")
    messages: list[Message] = []
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != {"role", "content"}:
            raise DataError(f"{where}: message {k} must have exactly 'role' and 'content'")
        role, content = row["role"], row["content"]
        if not isinstance(role, str) or role not in ROLES:
            hint = suggest(role, ROLES) if isinstance(role, str) else ""
            raise DataError(f"{where}: message {k} has the role {role!r}; use {', '.join(ROLES)}.{hint}")
        if role == "system" and k:
            raise DataError(f"{where}: message {k} is a system message, which may only be the first")
        if not isinstance(content, str):
            raise DataError(f"{where}: message {k} needs a text as content, got {type(content).__name__}")
        messages.append({"role": role, "content": _no_surrogates(content, where)})
    return tuple(messages)


def _no_surrogates(text: str, where: str) -> str:
    # JSON can spell half a character ("\\ud800"), which no file can store as UTF-8.
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise DataError(f"{where}: holds a lone surrogate escape (\\ud800-\\udfff), which is not a character")
    return text


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def texts_of(documents: Iterable[Document]) -> Iterator[str]:
    """Yield every written part of every document: what a tokenizer is trained on and words are counted in."""
    for document in documents:
        yield from document.parts
