"""The ledger: what happened in a run, in order, signed, so that later changes show.

One canonical-JSON line an entry: `{"body", "kind", "prev", "seq", "sig", "time"}`. `prev` is the SHA-256 of
the previous line (64 zeros for the first), `sig` the base64 Ed25519 signature over the canonical JSON of
the entry without `sig`. Entry 0's body carries the public key.

What a chain alone cannot show: a deleted tail, and a chain signed anew by the key's owner or with another
key. So every append also writes the head to $GLASSHOUSE_HOME/heads, and `verify_ledger` takes a head and a
key from outside.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from glasshouse.base import atomic
from glasshouse.base.chain import GENESIS, line_digest, read_chain, sign_entry, split_lines
from glasshouse.base.crash import crash_point
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import GlasshouseError, LedgerError
from glasshouse.base.keys import glasshouse_home, public_hex
from glasshouse.base.ledger_check import VerifyResult, verify_ledger

__all__ = ["Ledger", "VerifyResult", "verify_ledger"]


def utc_now() -> str:
    """Return the time as ISO-8601 UTC with microseconds."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Ledger:
    """An open ledger file, to which this process may append (hold the run's lock meanwhile).

    Opening recovers a torn last line: its bytes are saved as `<file>.torn-<n>` and cut off. It raises
    `LedgerError` for anything else: a changed line (named), another key, or fewer entries than the head
    recorded outside the run.
    """

    def __init__(
        self,
        path: str | Path,
        key: Ed25519PrivateKey,
        *,
        home: str | Path | None = None,
        now: Callable[[], str] = utc_now,
    ) -> None:
        self.path = Path(path)
        self.recovered: Path | None = None  # where a torn last line was saved on opening
        self._key, self._now = key, now
        self._heads = glasshouse_home(home) / "heads"
        data = self.path.read_bytes() if self.path.exists() else b""
        self._lines, torn = split_lines(data)
        entries, problem = read_chain(self._lines)
        if problem:
            raise LedgerError(f"{self.path}: {problem}. Restore the file from a backup; nothing was written")
        if entries and entries[0]["body"]["public_key"] != public_hex(key):
            raise LedgerError(
                f"{self.path} was begun with another key; set GLASSHOUSE_HOME to the folder that holds it"
            )
        self._check_recorded_head(torn)
        if torn:
            self._recover(torn)
        if self._lines:
            self._record_head()

    def __len__(self) -> int:
        return len(self._lines)

    def entries(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return all entries in order, or those of one kind; changing them changes nothing here."""
        entries = [json.loads(line) for line in self._lines]
        return [entry for entry in entries if kind is None or entry["kind"] == kind]

    def head(self) -> str:
        """Return the SHA-256 of the last entry, signature included (64 zeros while there is none)."""
        return line_digest(self._lines[-1]) if self._lines else GENESIS

    def append(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Sign and write one entry, fsync it, record the new head outside the run, and return the entry.

        Raises `LedgerError` if `body` is not JSON or someone else wrote to the file, `DiskError` if it
        cannot be written; the file is then as before.
        """
        if not isinstance(body, dict):
            raise LedgerError(f"a ledger entry's body must be a dict, got {type(body).__name__}")
        if not self._lines:
            body = {**body, "public_key": public_hex(self._key)}
        unsigned = {
            "seq": len(self._lines),
            "time": self._now(),
            "kind": kind,
            "body": body,
            "prev": self.head(),
        }
        try:
            line = sign_entry(unsigned, self._key)
        except GlasshouseError as error:
            raise LedgerError(f"cannot write a '{kind}' entry to {self.path}: {error}") from error
        crash_point("ledger-before-append")
        self._write(line)
        self._lines.append(line)
        crash_point("ledger-before-head")
        self._record_head()
        entry: dict[str, Any] = json.loads(line)
        return entry

    def _write(self, line: bytes) -> None:
        expected = sum(map(len, self._lines))
        with atomic.disk_errors(self.path):
            is_new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size != expected:
                    raise LedgerError(
                        f"{self.path} has {size} bytes where this process left {expected}: something else "
                        "wrote to it; end the other process, then resume"
                    )
                try:
                    written = 0
                    while written < len(line):
                        written += os.write(descriptor, line[written:])
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
            if is_new:
                atomic.fsync_folder(self.path.parent)

    def _recover(self, torn: bytes) -> None:
        # Saved before it is cut off: a torn line is also what a changed last byte looks like.
        number = 1
        while (saved := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        atomic.write_bytes(saved, torn)
        atomic.write_bytes(self.path, b"".join(self._lines))
        self.recovered = saved

    def _head_file(self) -> Path:
        # The folder is part of the name, so that a copied run does not overwrite the original's head.
        where = str(self.path.resolve()).encode("utf-8", "surrogateescape")
        tag = sha256_bytes(self._lines[0] + where)[:16]
        return self._heads / f"{self.path.resolve().parent.name}-{tag}.json"

    def _record_head(self) -> None:
        record = {
            "ledger": str(self.path.resolve()),
            "entries": len(self._lines),
            "head": self.head(),
            "public_key": public_hex(self._key),
        }
        atomic.write_json(self._head_file(), record)

    def _check_recorded_head(self, torn: bytes) -> None:
        if not self._lines or not self._head_file().exists():
            return
        path = self._head_file()
        try:
            record = json.loads(path.read_bytes())
            count, head = int(record["entries"]), str(record["head"])
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{path} is not a head record ({error}): move it away and try again") from error
        if count == len(self._lines) + 1 and torn:
            return
        if not 0 < count <= len(self._lines) or line_digest(self._lines[count - 1]) != head:
            raise LedgerError(
                f"{self.path} has {len(self._lines)} entries, but {path} recorded entry {count} with head "
                f"{head[:16]}: entries were deleted or replaced. Restore the run from a backup, or, to "
                "accept the loss, move that record away"
            )
