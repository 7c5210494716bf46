"""`glasshouse ledger verify` names what is wrong and says what it could not check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cli.command import call, entries


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def head(run: Path) -> str:
    out = call("ledger", "verify", run).out
    return next(line.split()[-1] for line in out.splitlines() if line.startswith("head "))


def test_a_whole_run_is_self_consistent_and_what_was_not_checked_is_said(run: Path) -> None:
    done = call("ledger", "verify", run)
    assert done.code == 0
    assert "completeness and author unverified" in done.out
    assert done.out.count("not checked") >= 2


def test_with_head_and_key_completeness_and_author_are_checked_too(run: Path) -> None:
    key = entries(run)[0]["body"]["public_key"]
    done = call("ledger", "verify", run, "--head", head(run), "--key", key)
    assert done.code == 0 and "complete up to the head given, and signed by the key given" in done.out


@pytest.mark.parametrize("number", [1, 3])
def test_one_changed_byte_is_detected_and_its_line_named(run: Path, number: int) -> None:
    lines = (run / "ledger.jsonl").read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1].replace(b'"seq":', b'"seq": ', 1)
    (run / "ledger.jsonl").write_bytes(b"\n".join(lines))
    done = call("ledger", "verify", run)
    assert done.code == 5
    wrong = next(line for line in done.out.splitlines() if line.startswith("WRONG"))
    assert f"line {number}" in wrong


def test_a_changed_and_a_missing_file_are_named(run: Path) -> None:
    config = run / "checkpoints" / "sft-000008.0" / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    (run / "evals" / "gate-000" / "verdicts.json").unlink()
    done = call("ledger", "verify", run)
    assert done.code == 5
    assert "checkpoints/sft-000008.0/config.json" in done.out and "changed" in done.out
    assert "evals/gate-000/verdicts.json" in done.out and "missing" in done.out


def test_a_deleted_tail_shows_only_with_the_head(run: Path) -> None:
    known = head(run)
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    assert call("ledger", "verify", run).code == 0
    done = call("ledger", "verify", run, "--head", known)
    assert done.code == 5 and "lines were deleted" in done.out


def test_another_key_shows(run: Path) -> None:
    done = call("ledger", "verify", run, "--key", "00" * 32)
    assert done.code == 5 and "the key given" in done.out


def test_a_folder_without_a_ledger_and_a_head_that_is_none_are_refused(run: Path, tmp_path: Path) -> None:
    assert call("ledger", "verify", tmp_path).code == 2
    assert call("ledger", "verify", run, "--head", "xyz").code == 2
