from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glasshouse.base.errors import DiskError, RunBusyError, UsageError
from glasshouse.base.run import RunFolder

HOLDER = """
import sys, time
from glasshouse.base.run import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_the_pid_until_the_first_is_dead(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusyError, match=f"process {holder.pid}"), run.lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with run.lock():
        assert (run.path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_given_back_even_when_the_block_fails(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError), run.lock():
        raise ValueError
    with run.lock(), pytest.raises(RunBusyError), run.lock():
        pass


def test_creating_twice_keeps_what_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run").create()
    run.recipe.write_text("{}")
    run.create()
    assert run.recipe.read_text() == "{}"
    assert run.checkpoints.is_dir() and run.evals.is_dir() and run.data.is_dir()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises((DiskError, FileExistsError), match="run"):
        RunFolder(tmp_path / "run").create()


def test_a_run_is_begun_by_its_first_ledger_entry_and_only_resumed_after_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    assert not run.begun(resume=False) and not run.begun(resume=True)
    run.ledger.touch()  # killed before anything was written
    assert not run.begun(resume=False)
    run.ledger.write_text("{}\n", "utf-8")
    assert run.begun(resume=True)
    with pytest.raises(UsageError, match=r"holds a run already: add --resume"):
        run.begun(resume=False)
