"""A killed job loses no row and repeats none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.judges import TOK, constitution, fingerprint, letters
from glasshouse.align.local import LocalEngine
from glasshouse.align.revise import Revising, revise
from glasshouse.align.rows import Rows, read_rows
from glasshouse.base.errors import DataError, RunBusyError

TESTS = Path(__file__).resolve().parents[1]
HOW = Revising(rounds=2, answer_tokens=6, critique_tokens=4, chunk=2)
PROMPTS = [f"How do I warm egg {k}?" for k in range(8)]


def work(path: str, n: int = len(PROMPTS)) -> None:
    """What the subprocess below does too."""
    revise(PROMPTS[:n], constitution(), LocalEngine(letters(), TOK), path, HOW)


def start(path: Path, **env: str) -> subprocess.Popen[bytes]:
    code = f"from align.test_rows import work; work({str(path)!r})"
    place = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **place})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    path = tmp_path_factory.mktemp("rows") / "whole.jsonl"
    work(str(path))
    return read_rows(path)


def test_a_job_killed_from_outside_goes_on_without_loss_or_repetition(
    tmp_path: Path, whole: list[dict[str, object]]
) -> None:
    path = tmp_path / "rows.jsonl"
    job = start(path)
    until = time.monotonic() + 60
    while time.monotonic() < until and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    before = read_rows(path)
    assert 3 <= len(before) < len(whole)
    work(str(path))
    after = read_rows(path)
    assert after[: len(before)] == before and fingerprint(after) == fingerprint(whole)


def test_a_kill_between_the_write_and_the_next_step_repeats_nothing(
    tmp_path: Path, whole: list[dict[str, object]]
) -> None:
    path = tmp_path / "rows.jsonl"
    assert start(path, GLASSHOUSE_CRASH_AT="rows-after-append:5").wait() == -signal.SIGKILL
    assert len(read_rows(path)) == 5
    with open(path, "ab") as file:
        file.write(b'{"key": "half a li')  # what a kill within a write leaves
    with Rows(path) as rows:
        assert rows.cut == 18 and len(rows) == 5
    work(str(path))
    assert fingerprint(read_rows(path)) == fingerprint(whole)


def test_every_row_names_what_it_rests_on(whole: list[dict[str, object]]) -> None:
    by_key = {r["key"]: r for r in whole}
    engine = LocalEngine(letters(), TOK)
    for row in whole:
        assert row["model"] == engine.digest and row["constitution"] == constitution().digest()
        if row["kind"] == "answer":
            assert row["parent"] == "" and row["principle"] == ""
            continue
        parent = by_key[row["parent"]]
        assert row["principle"] in {"p0", "p1", "p2"} and row["root"] in by_key
        asked = row["messages"]
        assert isinstance(asked, list) and parent["text"] == asked[-2]["content"]
        assert parent["kind"] == ("critique" if row["kind"] == "revision" else parent["kind"])
        said = constitution()[str(row["principle"])]
        assert asked[-1]["content"] == (said.critique if row["kind"] == "critique" else said.revision)


def test_chunks_and_batches_decide_nothing(tmp_path: Path, whole: list[dict[str, object]]) -> None:
    path = tmp_path / "rows.jsonl"
    engine = LocalEngine(letters(), TOK, batch_size=3)
    revise(PROMPTS, constitution(), engine, path, HOW.model_copy(update={"chunk": 5}))
    assert fingerprint(read_rows(path)) == fingerprint(whole)


def test_a_file_has_one_writer_and_no_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Rows(path) as rows:
        rows.add({"key": "a", "n": 1})
        with pytest.raises(RunBusyError, match="another job"):
            Rows(path)
        with pytest.raises(DataError, match="there already"):
            rows.add({"key": "a"})
        with pytest.raises(DataError, match="JSON"):
            rows.add({"key": "b", "x": float("nan")})
        with pytest.raises(DataError, match="JSON"):
            rows.add({"key": "b", "x": "\ud800"})
        assert len(rows) == 1
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2: not a row"):
        Rows(path)
    path.write_bytes(b'{"key": "a"}\n{"key": "a"}\n')
    with pytest.raises(DataError, match="twice"):
        read_rows(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glasshouse.base.errors import DiskError

    path = tmp_path / "rows.jsonl"
    with Rows(path) as rows:
        rows.add({"key": "a"})
        real, calls = os.write, []

        def short(file: int, data: bytes) -> int:
            calls.append(len(data))
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(file, data[:5])

        monkeypatch.setattr(os, "write", short)
        with pytest.raises(DiskError, match="no space left"):
            rows.add({"key": "b", "text": "longer than five bytes"})
        monkeypatch.undo()
        assert [r["key"] for r in read_rows(path)] == ["a"]
        assert path.read_bytes().endswith(b"\n") and "b" not in rows
        rows.add({"key": "b"})
    assert [r["key"] for r in read_rows(path)] == ["a", "b"]


def test_rows_handed_over_together_are_synced_once_and_kept_whole_when_the_next_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync
    with Rows(tmp_path / "rows.jsonl") as rows:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
        rows.add({"key": "a"})
        assert len(synced) == 1
        with pytest.raises(DataError, match="is there already"), rows.together():
            rows.add({"key": "b"})
            rows.add({"key": "c"})
            assert len(synced) == 1
            rows.add({"key": "a"})
        assert len(synced) == 2
        rows.add({"key": "d"})
        assert len(synced) == 3
    assert [r["key"] for r in read_rows(tmp_path / "rows.jsonl")] == ["a", "b", "c", "d"]
