from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base import atomic
from glasshouse.base.errors import DiskError, UsageError


@contextlib.contextmanager
def disk_with_room_for(n_bytes: int) -> Iterator[None]:
    """Let the kernel refuse files above `n_bytes`, as a full disk does: part of the bytes are written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_files_are_read_back_and_leave_no_temporary(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "deep" / "b", b"\x00\xff")
    atomic.write_text(tmp_path / "deep" / "t", "é\r\n")
    atomic.write_json(tmp_path / "deep" / "j", {"b": 1, "a": [0.5, None]})
    assert names(tmp_path / "deep") == ["b", "j", "t"]
    assert (tmp_path / "deep" / "t").read_bytes() == "é\r\n".encode()
    assert json.loads((tmp_path / "deep" / "j").read_text()) == {"a": [0.5, None], "b": 1}


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_a_second_write_replaces_the_first(old: bytes, new: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        atomic.write_bytes(path, old)
        atomic.write_bytes(path, new)
        assert path.read_bytes() == new
        assert names(Path(folder)) == ["f"]


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    atomic.write_bytes(path, b"old")
    with disk_with_room_for(100_000), pytest.raises(DiskError, match=r"no space left.*weights.*free some"):
        atomic.write_bytes(path, b"x" * 1_000_000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["weights"]


def test_a_disk_that_is_full_only_at_fsync_is_noticed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="free some space"):
        atomic.write_bytes(tmp_path / "f", b"data")
    assert names(tmp_path) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic.atomic_dir(tmp_path / "c") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not (tmp_path / "c").exists()
        assert folder.parent == tmp_path
    assert names(tmp_path) == ["c"]
    assert (tmp_path / "c" / "sub" / "a").read_text() == "a"


def test_a_folder_whose_writer_fails_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.atomic_dir(tmp_path / "c") as folder:
        (folder / "a").write_text("a")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_full_disk_while_filling_a_folder_leaves_nothing(tmp_path: Path) -> None:
    with disk_with_room_for(100_000), pytest.raises(DiskError, match="free some space"):
        with atomic.atomic_dir(tmp_path / "c") as folder:
            (folder / "a").write_bytes(b"x" * 1_000_000)
    assert names(tmp_path) == []


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(UsageError, match="exists already"), atomic.atomic_dir(tmp_path / "c"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from glasshouse.base import atomic
with atomic.atomic_dir(Path(sys.argv[1]) / "c") as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".c.tmp-")
    in_use = tmp_path / f".d.tmp-{os.getppid()}-0123abcd"
    in_use.write_text("another living process writes this")
    (tmp_path / ".hidden").write_text("mine")
    assert [path.name for path in atomic.sweep_temporaries(tmp_path)] == [left]
    assert names(tmp_path) == [in_use.name, ".hidden"]
    assert atomic.sweep_temporaries(tmp_path / "absent") == []
