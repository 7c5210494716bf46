"""Files and folders that are there whole or not at all, whatever dies in between.

Order of every write: temporary beside the target, flush, fsync, rename, fsync of the parent folder.
Without the last one a rename can be lost with the power. Temporaries are called `.<name>.tmp-<pid>-<random>`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasshouse.base.errors import DiskError, UsageError

TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)-[0-9a-f]{8}$")
# EDQUOT: a user's quota is exhausted, which to the person is the same thing as a full disk.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


def write_bytes(path: str | Path, b: bytes) -> None:
    """Write a file atomically, creating its folder. Raises `DiskError` when the disk is full or refuses."""
    with atomic_file(path) as temporary, open(temporary, "xb") as file:
        file.write(b)


def write_text(path: str | Path, s: str) -> None:
    """Write UTF-8 text atomically; newlines are kept as they are."""
    write_bytes(path, s.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """Write indented JSON with sorted keys atomically. NaN and infinities raise ValueError."""
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


@contextlib.contextmanager
def atomic_file(final: str | Path) -> Iterator[Path]:
    """Yield a name for a file that becomes `final` when the block ends, and vanishes if it raises.

    The block creates the file and closes it. A file that stood at `final` is replaced. Raises `DiskError`
    when the disk is full or refuses.
    """
    final = Path(final)
    temporary = temporary_beside(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(final.parent)


@contextlib.contextmanager
def atomic_dir(final: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` when the block ends, and vanishes if it raises.

    Every file in it is fsynced before the rename. Raises `UsageError` if `final` exists: a folder
    cannot be replaced in one step, so the caller decides what to do with the old one.
    """
    final = Path(final)
    if final.exists():
        raise UsageError(f"{final} exists already; remove it or choose another name")
    temporary = temporary_beside(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            _fsync_tree(temporary)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(final.parent)


def sweep_temporaries(folder: str | Path) -> list[Path]:
    """Remove temporaries in `folder` whose process is gone, and return them.

    A temporary of a living process (other than this one) may still be in use and is left alone.
    """
    swept = []
    root = Path(folder)
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = TEMPORARY.match(path.name)
        if match is None or _someone_else_alive(int(match.group(1))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        swept.append(path)
    return swept


def temporary_beside(path: Path) -> Path:
    """Return a fresh name in the same folder (so that a rename can reach `path`) which the sweep knows."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    _fsync(path)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn 'no space left' and 'not writable' inside the block into a `DiskError` naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskError(
                f"no space left while writing {path}: free some space on that disk and run the same "
                "command again; nothing half-written was kept"
            ) from error
        if error.errno in REFUSED:
            raise DiskError(
                f"cannot write {path} ({error.strerror}): check that the folder is yours and writable"
            ) from error
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _fsync(Path(folder, name))
        fsync_folder(Path(folder))


def _someone_else_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
