"""Exact de-duplication: two documents are the same if their words are, whatever the blanks between them."""

from __future__ import annotations

from glasshouse.base.digest import digest_of
from glasshouse.data.documents import Document


def fingerprint(document: Document) -> str:
    """Return the SHA-256 of a document, every run of white space made one blank; roles count in a chat."""
    if document.messages is None:
        return digest_of(_squeeze(document.text or ""))
    return digest_of([[m["role"], _squeeze(m["content"])] for m in document.messages])


class Seen:
    """Remembers fingerprints and who had them first."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def first_with(self, document: Document, name: str) -> str | None:
        """Return the name of an earlier document with the same words, else remember this one as `name`."""
        print_ = fingerprint(document)
        if print_ in self._first:
            return self._first[print_]
        self._first[print_] = name
        return None


def _squeeze(text: str) -> str:
    return " ".join(text.split())
