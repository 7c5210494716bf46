from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from glasshouse.base.crash import crash_point
for i in range(3):
    crash_point("a")
    crash_point("b")
print("alive")
"""


def run(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


def test_the_kth_time_a_point_is_reached_kills_the_process(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    done = run(GLASSHOUSE_CRASH_AT="b:2", GLASSHOUSE_CRASH_LIST=str(reached))
    assert done.returncode == -9
    assert reached.read_text().split() == ["a", "b", "a", "b"]


def test_a_bare_name_means_the_first_time(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    assert run(GLASSHOUSE_CRASH_AT="b", GLASSHOUSE_CRASH_LIST=str(reached)).returncode == -9
    assert reached.read_text().split() == ["a", "b"]


def test_without_the_variables_nothing_happens() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert run(GLASSHOUSE_CRASH_AT="b:9").returncode == 0
