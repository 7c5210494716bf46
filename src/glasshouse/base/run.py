"""A run is a folder, complete in itself; this file says where its parts are and who may write."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from glasshouse.base.atomic import disk_errors, fsync_folder
from glasshouse.base.errors import RunBusyError, UsageError


class RunFolder:
    """Paths inside a run folder. Making one touches no file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.ledger = self.path / "ledger.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.lenses = self.path / "lenses"
        self.evals = self.path / "evals"
        self.report = self.path / "report.html"
        self.data = self.path / "data"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def create(self) -> RunFolder:
        """Make the folder and its sub-folders where missing. Raises `DiskError` if that cannot be done."""
        with disk_errors(self.path):
            for folder in (self.path, self.checkpoints, self.lenses, self.evals, self.data):
                folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.path)
            fsync_folder(self.path.parent)
        return self

    def begun(self, resume: bool) -> bool:
        """Whether a run was begun here. Raises `UsageError` if one was and ``resume`` is not asked for."""
        began = self.ledger.is_file() and self.ledger.stat().st_size > 0
        if began and not resume:
            raise UsageError(
                f"{self.path} holds a run already: add --resume to go on, or name another run folder with "
                "--run"
            )
        return began

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; raises `RunBusyError`, naming the holder's pid, if it is held.

        The kernel drops the lock when the process ends, however it ends, so no lock is ever stale.
        """
        path = self.path / "run.lock"
        with disk_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise RunBusyError(
                    f"{self.path} is in use by process {holder}: wait for it to end or stop it, "
                    "or choose another run folder"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            try:
                yield
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
