"""SHA-256, as lower-case hex, of bytes, files, folders and values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glasshouse.base.canonical import canonical_json


def sha256_bytes(b: bytes) -> str:
    """Return the SHA-256 of `b` as 64 hex digits."""
    return hashlib.sha256(b).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes; reads it in pieces. Raises OSError if unreadable."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(obj: Any) -> str:
    """Return the SHA-256 of `canonical_json(obj)`: equal values, equal digests."""
    return sha256_bytes(canonical_json(obj))


def digest_folder(path: str | Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return {name: SHA-256} for files below `path`, sorted by name.

    `names` are POSIX paths relative to `path`; without them every regular file below it is taken.
    """
    root = Path(path)
    if names is None:
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    return {name: sha256_file(root / name) for name in sorted(names)}
