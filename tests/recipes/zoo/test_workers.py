"""Worker processes: a death costs one try, a full disk ends the work, and nobody outlives the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glasshouse.base.errors import DiskError
from glasshouse.recipes.zoo.workers import Done, Pool, alive
from recipes.zoo.work import work


def done(folder: Path, *what: str, n: int = 2, **more: float) -> dict[str, Done]:
    pool = Pool(work, n, **more)
    return {d.job[1]: d for d in pool.run([(str(folder), w) for w in what])}


def begun(folder: Path) -> list[str]:
    return [line.rpartition(" ")[0] for line in (folder / "begun.txt").read_text().splitlines()]


def test_jobs_are_done_and_a_worker_that_died_is_replaced(tmp_path: Path) -> None:
    found = done(tmp_path, "a", "dies once", "raises", "b", "dies", "c")
    assert {k: d.result for k, d in found.items() if not d.problem} == {
        "a": "A",
        "b": "B",
        "c": "C",
        "dies once": "DIES ONCE",
    }
    assert "nothing grew" in found["raises"].problem
    assert "exit code -9" in found["dies"].problem
    assert begun(tmp_path).count("dies") == 2 and begun(tmp_path).count("raises") == 1


def test_a_full_disk_ends_the_work_at_once(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No space left"):
        done(tmp_path, "a", "full", *"bcdefgh", n=1)
    assert begun(tmp_path) == ["a", "full"]


def test_a_job_that_hangs_is_ended_and_nothing_is_begun_after_the_time_is_up(tmp_path: Path) -> None:
    assert "ended 2 times" in done(tmp_path, "sleeps", limit_s=3)["sleeps"].problem
    pool = Pool(work, 1)
    assert list(pool.run([(str(tmp_path), "late")], until=time.monotonic() - 1)) == []
    assert begun(tmp_path) == ["sleeps", "sleeps"]


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "from glasshouse.recipes.zoo.workers import Pool\n"
        "from recipes.zoo.work import work\n"
        "if __name__ == '__main__':\n"
        f"    list(Pool(work, 1).run([({str(tmp_path)!r}, 'sleeps')]))\n"
    )
    (tmp_path / "parent.py").write_text(script)
    tests = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": tests}
    )
    until = time.monotonic() + 60
    while not (tmp_path / "begun.txt").exists() or not (tmp_path / "begun.txt").read_text().endswith("\n"):
        assert time.monotonic() < until
        time.sleep(0.05)
    worker = int((tmp_path / "begun.txt").read_text().split()[-1])
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(worker):
        assert time.monotonic() < until
        time.sleep(0.05)
