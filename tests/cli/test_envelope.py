"""`glasshouse envelope`: what it refuses and how it reads; what it makes is tested with the recipe."""

from __future__ import annotations

from pathlib import Path

from cli.command import call


def test_a_run_with_something_planted_is_no_clean_twin(organism: Path, tmp_path: Path) -> None:
    done = call("envelope", organism, "--out", tmp_path / "clean.json")
    assert done.code == 2 and "something was planted in this run" in done.err
    assert not (tmp_path / "clean.json").exists()


def test_the_help_names_the_runs_the_file_and_the_common_start() -> None:
    done = call("envelope", "--help")
    assert done.code == 0
    said = " ".join(done.out.split())
    assert all(word in said for word in ("RUN...", "--out", "--from", "dealt in the order given"))


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    done = call("envelope", tmp_path / "nowhere", "--out", tmp_path / "clean.json")
    assert done.code == 2 and "nowhere" in done.err
