"""Kill -9 at every instrumented point, resume, and compare bit for bit with the run that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.ledger import verify_ledger
from train import tiny
from train.tiny import end_of

POINTS = {
    *("checkpoint.before-rename", "checkpoint.after-rename", "checkpoint.after-ledger"),
    *("gate.before", "gate.after", "decision.before-ledger", "decision.after-ledger"),
    *("rollback.before-load", "rollback.after-load", "step", "finish.after-ledger"),
    *("ledger-before-append", "ledger-before-head"),
}
Run = Callable[..., int]


@pytest.fixture(scope="module")
def run(glasshouse_home: Path) -> Iterator[Run]:
    """Runs the tiny run in a child of a process that imported torch once; returns the child's wait status."""
    tests = Path(tiny.__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLASSHOUSE_HOME": str(glasshouse_home)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *filter(None, [environment.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", tiny.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as driver:
        assert driver.stdin and driver.stdout

        def order(folder: Path, **more: Any) -> int:
            assert driver.stdin and driver.stdout
            driver.stdin.write(json.dumps({"folder": str(folder), "resume": False} | more) + "\n")
            driver.stdin.flush()
            return int(json.loads(driver.stdout.readline()))

        yield order
        driver.stdin.close()


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run that is never killed, and the crash points that it reaches, in order."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder / "run", list=str(folder / "points")) == 0
    return folder / "run", (folder / "points").read_text().split()


def killed_and_resumed(run: Run, folder: Path, *crashes: str, **more: Any) -> None:
    for number, crash in enumerate(crashes):
        assert run(folder, crash=crash, resume=number > 0, **more) == 9, f"{crash} was not reached"
    assert run(folder, resume=True, **more) == 0


def test_every_instrumented_point_is_reached(whole: tuple[Path, list[str]]) -> None:
    assert set(whole[1]) == POINTS


def every_time(points: list[str]) -> list[str]:
    """``name:k`` for the k-th time that each point is reached, for every k."""
    seen: Counter[str] = Counter()
    named = []
    for name in points:
        seen[name] += 1
        named.append(f"{name}:{seen[name]}")
    return named


def test_killed_anywhere_and_resumed_is_the_same_run(
    run: Run, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected = end_of(whole[0])
    for crash in every_time(whole[1]):
        folder = tmp_path / crash.replace(":", "-")
        killed_and_resumed(run, folder, crash)
        assert end_of(folder) == expected, f"killed at {crash}"
        assert verify_ledger(folder).ok, crash
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "crashes",
    [
        ("step:7", "resume.before-load", "resume.after-load", "step:1"),
        ("gate.before:2", "gate.after:1", "decision.after-ledger:1", "resume.after-load"),
        (
            "rollback.before-load",
            "resume.before-load",
            "checkpoint.after-rename:1",
            "checkpoint.before-rename:1",
        ),
        ("checkpoint.after-rename:1", "checkpoint.after-rename:1", "ledger-before-head:1"),
    ],
)
def test_killed_again_while_resuming_is_the_same_run(
    run: Run, whole: tuple[Path, list[str]], tmp_path: Path, crashes: tuple[str, ...]
) -> None:
    killed_and_resumed(run, tmp_path / "run", *crashes)
    assert end_of(tmp_path / "run") == end_of(whole[0])
    assert verify_ledger(tmp_path / "run").ok


SPIKE_POINTS = {
    "skip": ("step:44", "step:45", "step:46", "checkpoint.before-rename:5", "checkpoint.after-ledger:5"),
    "rewind": (
        *("spike.before-ledger", "spike.after-ledger", "rollback.before-load", "rollback.after-load"),
        *("step:46", "checkpoint.after-rename:5"),
    ),
}


@pytest.mark.parametrize("on_spike", ["skip", "rewind"])
def test_killed_around_a_spike_and_resumed_is_the_same_run(run: Run, tmp_path: Path, on_spike: str) -> None:
    """The window of past losses, what was skipped, and what is left out: all come back."""
    assert run(tmp_path / "whole", on_spike=on_spike) == 0
    expected = end_of(tmp_path / "whole")
    seen = [row for row in expected[2] if row[0] == "spike"]
    assert len(seen) == 1 and seen[0][3] == 45
    assert any(row[0] == "monitor" for row in expected[2])
    for crash in SPIKE_POINTS[on_spike]:
        folder = tmp_path / crash.replace(":", "-")
        killed_and_resumed(run, folder, crash, on_spike=on_spike)
        assert end_of(folder) == expected, f"killed at {crash}"
        assert verify_ledger(folder).ok, crash
