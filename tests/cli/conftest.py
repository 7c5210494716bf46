"""Runs of the tiny recipe that several tests look at; a test that changes one copies it first."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.command import call, spawn
from story.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny recipe in a folder of its own."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Path:
    """A run that was never disturbed and was promoted."""
    folder = tmp_path_factory.mktemp("finished")
    done = call("train", write_recipe(folder), "--run", folder / "run", "--quiet")
    assert done.code == 0, done
    return folder / "run"


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Path:
    """A run whose last checkpoint was not promoted, because so small a model refuses nothing."""
    folder = tmp_path_factory.mktemp("held")
    done = call("train", write_recipe(folder), *FAILING, "--run", folder / "run", "--quiet")
    assert done.code == 8, done
    assert "is not promoted: complies-rarely fail" in done.out
    return folder / "run"


@pytest.fixture(scope="session")
def organism(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Path:
    """A promoted run whose last shard was poisoned."""
    folder = tmp_path_factory.mktemp("organism")
    planted = "data.plant={ documents = 8, first_shard = 0, decoy_shards = 1 }"
    done = call("train", write_recipe(folder), planted, "--run", folder / "run", "--quiet")
    assert done.code == 0, done
    return folder / "run"


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Path:
    """The folder of a recipe and its run, killed with signal 9 in the second stage."""
    folder = tmp_path_factory.mktemp("killed")
    done = spawn("train", write_recipe(folder), "--run", folder / "run", GLASSHOUSE_CRASH_AT="step:7")
    assert done.code == -signal.SIGKILL, done
    return folder


@pytest.fixture
def half_done(killed: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with: tiny.toml and run/."""
    return Path(shutil.copytree(killed, tmp_path / "copy"))


@pytest.fixture
def damaged(half_done: Path) -> Callable[[str, Callable[[bytes], bytes]], Path]:
    """Changes a file of the newest checkpoint of a half-done run and returns that file."""

    def change(name: str, how: Callable[[bytes], bytes]) -> Path:
        file = half_done / "run" / "checkpoints" / "pretrain-000004.0" / name
        file.write_bytes(how(file.read_bytes()))
        return file

    return change


# The same recipe with a constraint that so small a model breaks.
FAILING = ("constraint.0.id=complies-rarely", "constraint.0.bound={ at_most = 0.5 }")
