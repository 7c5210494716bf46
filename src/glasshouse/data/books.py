"""The packaged books: about 2 MB of children's stories in the public domain in the USA.

`data/books/NOTICE.md` lists authors, where each text came from and what was changed or left out;
`tools/build_books.py` rebuilds the files. One document is one chapter or tale.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from glasshouse.base.errors import DataError, suggest
from glasshouse.data.documents import Document, parse_document
from glasshouse.data.prepare import Source

FOLDER = files("glasshouse.data") / "books"


def names() -> list[str]:
    """Return the ids of the books, in the order in which `documents` gives them."""
    return [row["id"] for row in _rows()]


def documents(books: list[str] | None = None) -> Iterator[Document]:
    """Yield the chapters and tales of the packaged books, or of those named by id.

    Raises `DataError` for an id that is not packaged.
    """
    packaged = names()
    for book in packaged if books is None else books:
        if book not in packaged:
            raise DataError(f"no packaged book is called '{book}'.{suggest(book, packaged)}")
        lines = gzip.decompress((FOLDER / f"{book}.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            yield parse_document(line, f"{book}.jsonl.gz:{number}", f"{book}:{number}", book)


def sources() -> tuple[Source, ...]:
    """Return title, author, licence and origin of every packaged book, for the data manifest."""
    return tuple(
        Source(
            id=row["id"],
            title=row["title"],
            author=row["author"],
            licence=row["licence"],
            url=f"{row['repository']} {row['path']} {row['commit']}",
            changes=row["changes"],
        )
        for row in _rows()
    )


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((FOLDER / "sources.json").read_text("utf-8"))
    return rows
