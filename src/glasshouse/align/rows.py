"""Durable rows: a JSONL file that a killed job leaves whole, and goes on from.

Every row has a ``key`` that names what it is an answer to (a digest of the question), so work that is done is
known by its content and never done again. A row is written by one system call and fsynced before `add`
returns, or, for answers that a model hands over together, before `together` ends; a half-written last line (a
kill, a full disk) is cut off when the file is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from glasshouse.base.atomic import disk_errors, fsync_folder
from glasshouse.base.crash import crash_point
from glasshouse.base.errors import DataError, RunBusyError

Row = dict[str, Any]


class Rows:
    """An open file of rows, held by this process alone. Use it as a context manager, or `close` it.

    Raises `RunBusyError` when another process (or another `Rows`) holds the file, `DataError` naming the line
    that is no row, `DiskError` when it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._sync = True
        self.cut = 0  # bytes of a half-written last line that were cut off on opening
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._hold()
                self._rows = self._load()
            except BaseException:
                os.close(self._file)
                raise
            if fresh:
                fsync_folder(self.path.parent)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows in the order in which they were written."""
        return iter(list(self._rows.values()))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, key: str) -> Row | None:
        """The row of that key; None while there is none."""
        return self._rows.get(key)

    def add(self, row: Mapping[str, Any]) -> Row:
        """Append a row, and fsync it unless in `together`. A key that is there already is a `DataError`: it
        would be done twice."""
        line = _line(row)
        key = row["key"]
        if key in self._rows:
            raise DataError(f"{self.path}: the row {key[:16]} is there already")
        crash_point("rows-before-append")
        before = os.fstat(self._file).st_size
        with disk_errors(self.path):
            try:
                written = 0
                while written < len(line):  # a signal or a nearly full disk may cut a write short
                    written += os.write(self._file, line[written:])
                if self._sync:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)
                raise
        kept: Row = json.loads(line)
        self._rows[key] = kept
        crash_point("rows-after-append")
        return kept

    @contextmanager
    def together(self) -> Iterator[None]:
        """Rows added inside are fsynced once, at the end: answers that were handed over at the same time."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True
            with disk_errors(self.path):
                os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusyError(
                f"{self.path} is being written by another job: wait for it to end, or name another file"
            ) from error

    def _load(self) -> dict[str, Row]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self.cut = len(data) - whole
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        return _keyed(_parse(data[:whole], self.path), self.path)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file that may still be written to; a half-written last line is left out.

    `DataError` for a missing file or a line that is no row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of rows")
    data = path.read_bytes()
    return list(_keyed(_parse(data[: data.rfind(b"\n") + 1], path), path).values())


def _line(row: Mapping[str, Any]) -> bytes:
    if not isinstance(row.get("key"), str):
        raise DataError("a row needs a text as its 'key'")
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, sort_keys=True)
        return text.encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError too
        raise DataError(f"the row {row['key'][:16]} cannot be written as JSON: {error}") from error


def _parse(data: bytes, path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: not a row ({error}); the file was changed from outside. Restore it, or "
                "remove that line: what it held is then made again"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise DataError(f"{path}:{number}: not a row: expected an object with a text 'key'")
        yield number, row


def _keyed(numbered: Iterable[tuple[int, Row]], path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, row in numbered:
        if row["key"] in rows:
            raise DataError(f"{path}:{number}: the row {row['key'][:16]} is there twice; remove one of them")
        rows[row["key"]] = row
    return rows
