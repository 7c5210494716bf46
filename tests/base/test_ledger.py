from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.chain import sign_entry
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import DiskError, LedgerError, UsageError
from glasshouse.base.keys import public_hex, public_pem, signing_key
from glasshouse.base.ledger import Ledger, verify_ledger

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def write_run(folder: Path, n: int = 4) -> Ledger:
    """Write a run folder with `n` entries, one of which names an artefact."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "w").write_bytes(b"weights")
    ledger = Ledger(folder / "ledger.jsonl", KEY)
    ledger.append("run", {"recipe": "0" * 64})
    for i in range(1, n - 1):
        ledger.append("note", {"i": i, "text": "é \n", "x": [0.5, None, {"deep": True}]})
    ledger.append("checkpoint", {"artifacts": {"checkpoints/w": sha256_bytes(b"weights")}})
    return ledger


@pytest.fixture(scope="module")
def run_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("ledger") / "run"
    write_run(folder)
    return (folder / "ledger.jsonl").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "w").write_bytes(b"weights")
    return folder


def line_of(data: bytes, position: int) -> int:
    return data[:position].count(b"\n") + 1


def test_an_untouched_ledger_verifies_and_claims_no_more_than_it_checked(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run")
    plain = verify_ledger(tmp_path / "run")
    assert plain.ok and not plain.problems
    assert plain.summary == "self-consistent; completeness and author unverified"
    assert (plain.n_entries, plain.head, plain.public_key) == (4, ledger.head(), public_hex(KEY))
    (tmp_path / "pub").write_bytes(public_pem(KEY))
    full = verify_ledger(tmp_path / "run", head=ledger.head(), key=tmp_path / "pub")
    assert full.ok and full.complete and full.author
    assert "unverified" not in full.summary


def test_entries_are_the_same_when_the_ledger_is_opened_again(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run")
    again = Ledger(tmp_path / "run" / "ledger.jsonl", KEY)
    assert again.entries() == ledger.entries()
    assert again.head() == ledger.head()
    assert [entry["seq"] for entry in again.entries()] == [0, 1, 2, 3]
    assert again.entries("run")[0]["body"]["public_key"] == public_hex(KEY)
    entry = again.append("note", {"tuple": (1, 2)})
    assert entry == again.entries()[-1] and entry["body"] == {"tuple": [1, 2]}


@settings(max_examples=300)
@given(st.data())
def test_any_single_changed_byte_is_detected_and_its_line_named(
    run_bytes: bytes, scratch: Path, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(run_bytes) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != run_bytes[position]))
    changed = run_bytes[:position] + bytes([value]) + run_bytes[position + 1 :]
    (scratch / "ledger.jsonl").write_bytes(changed)
    result = verify_ledger(scratch)
    assert not result.ok
    number = line_of(run_bytes, position)
    assert result.problems[0].startswith(f"line {number} ")
    if position < len(run_bytes) - 1:  # a changed last line end looks like a torn line, which is recovered
        with pytest.raises(LedgerError, match=f"line {number} "):
            Ledger(scratch / "ledger.jsonl", KEY)
        assert (scratch / "ledger.jsonl").read_bytes() == changed


@given(st.data())
def test_removed_doubled_or_swapped_lines_are_detected(
    run_bytes: bytes, scratch: Path, data: st.DataObject
) -> None:
    lines = run_bytes.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 2))
    edits = [lines[:at] + lines[at + 1 :], [*lines[:at], lines[at], *lines[at:]]]
    edits.append([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])
    (scratch / "ledger.jsonl").write_bytes(b"".join(data.draw(st.sampled_from(edits))))
    assert not verify_ledger(scratch).ok


@given(st.data())
def test_a_torn_last_line_is_reported_saved_and_cut_off(run_bytes: bytes, data: st.DataObject) -> None:
    import tempfile

    start = run_bytes[:-1].rfind(b"\n") + 1
    torn_at = data.draw(st.integers(start + 1, len(run_bytes) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.write_bytes(run_bytes[:torn_at])
        assert verify_ledger(path).problems[0].startswith("line 4 is incomplete")
        ledger = Ledger(path, KEY)
        assert ledger.recovered is not None
        assert ledger.recovered.read_bytes() == run_bytes[start:torn_at]
        assert path.read_bytes() == run_bytes[:start]
        ledger.append("resume", {})
        assert verify_ledger(path).ok
        assert [entry["kind"] for entry in ledger.entries()] == ["run", "note", "note", "resume"]


def test_a_ledger_torn_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"body":{"pub')
    ledger = Ledger(path, KEY)
    assert len(ledger) == 0
    ledger.append("run", {})
    assert verify_ledger(path).ok


def test_a_deleted_tail_shows_only_with_the_head(tmp_path: Path) -> None:
    head = write_run(tmp_path / "run").head()
    path = tmp_path / "run" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert verify_ledger(path, key=KEY.public_key()).ok
    result = verify_ledger(path, head=head)
    assert not result.ok and "lines were deleted" in result.problems[0]
    with pytest.raises(LedgerError, match="entries were deleted or replaced"):
        Ledger(path, KEY)  # the head recorded outside the run gives it away
    older = sha256_bytes(lines[1].strip())
    result = verify_ledger(path, head=older[:16])
    assert result.ok and not result.complete
    assert any("older than the last line" in note for note in result.unchecked)


def test_a_chain_signed_anew_shows_only_with_the_key(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run")
    forger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    previous, lines = "0" * 64, []
    for entry in ledger.entries():
        unsigned = {name: value for name, value in entry.items() if name != "sig"} | {"prev": previous}
        if entry["seq"] == 0:
            unsigned["body"] = {**entry["body"], "public_key": public_hex(forger), "recipe": "f" * 64}
        lines.append(sign_entry(unsigned, forger))
        previous = sha256_bytes(lines[-1].strip())
    (tmp_path / "run" / "ledger.jsonl").write_bytes(b"".join(lines))
    assert verify_ledger(tmp_path / "run").ok
    result = verify_ledger(tmp_path / "run", key=public_hex(KEY))
    assert not result.ok and "the key given" in result.problems[0]
    assert not verify_ledger(tmp_path / "run", head=ledger.head()).ok
    with pytest.raises(LedgerError, match="another key"):
        Ledger(tmp_path / "run" / "ledger.jsonl", KEY)


def test_artefacts_changed_missing_or_outside_are_named_and_deleted_ones_unchecked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ledger = write_run(run)
    (run / "checkpoints" / "w").write_bytes(b"weightz")
    assert "checkpoints/w (line 4): changed" in verify_ledger(run).problems[0]
    (run / "checkpoints" / "w").unlink()
    assert verify_ledger(run).problems == ["checkpoints/w (line 4): missing"]
    ledger.append("decision", {"deleted": ["checkpoints"]})
    result = verify_ledger(run)
    assert result.ok and any("checkpoints/w" in note and "deleted" in note for note in result.unchecked)
    (run / "report.html").write_text("x")
    assert any("report.html" in note for note in verify_ledger(run).unchecked)
    (tmp_path / "secret").write_text("s")
    ledger.append("bad", {"artifacts": {"../secret": sha256_bytes(b"s")}})
    assert "leads out of the run folder" in verify_ledger(run).problems[0]


@pytest.mark.parametrize(
    "body", [{"x": float("nan")}, {"x": {1}}, {1: 2}, {"x": b""}, {"x": Path("p")}, ["no dict"]]
)
def test_a_body_that_is_not_json_is_refused_and_nothing_is_written(tmp_path: Path, body: Any) -> None:
    ledger = write_run(tmp_path / "run")
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError):
        ledger.append("note", body)
    assert ledger.path.read_bytes() == before
    ledger.append("note", {})
    assert verify_ledger(ledger.path).ok


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    import resource

    ledger = write_run(tmp_path / "run")
    before = ledger.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50_000, hard))
    try:
        with pytest.raises(DiskError, match="free some space"):
            ledger.append("note", {"long": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger.path.read_bytes() == before
    ledger.append("note", {})
    assert verify_ledger(ledger.path).ok


def test_a_second_writer_is_noticed(tmp_path: Path) -> None:
    first = write_run(tmp_path / "run")
    Ledger(first.path, KEY).append("note", {})
    with pytest.raises(LedgerError, match="something else wrote to it"):
        first.append("note", {})


def test_the_head_is_recorded_outside_the_run_and_a_copy_has_a_record_of_its_own(tmp_path: Path) -> None:
    import shutil

    ledger = Ledger(tmp_path / "run" / "ledger.jsonl", KEY, home=tmp_path / "home", now=lambda: "now")
    ledger.append("run", {})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    ledger.append("note", {})
    (record,) = (tmp_path / "home" / "heads").iterdir()
    assert json.loads(record.read_text())["head"] == ledger.head()
    copied = Ledger(tmp_path / "copy" / "ledger.jsonl", KEY, home=tmp_path / "home")
    assert len(copied) == 1
    assert len(list((tmp_path / "home" / "heads").iterdir())) == 2


KILLED = """
import sys
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
ledger = Ledger(sys.argv[1], signing_key())
for i in range(3):
    ledger.append("note", {"i": i})
"""


@pytest.mark.parametrize("point", ["ledger-before-append:2", "ledger-before-head:2"])
def test_a_process_killed_around_an_append_leaves_a_ledger_that_opens(tmp_path: Path, point: str) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "GLASSHOUSE_CRASH_AT": point},
        timeout=60,
    )
    assert done.returncode == -9
    ledger = Ledger(path, signing_key())
    assert len(ledger) == (1 if "append" in point else 2)
    ledger.append("resume", {})
    assert verify_ledger(path, head=ledger.head()).complete


def test_what_cannot_be_verified_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ledger at"):
        verify_ledger(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(b"")
    assert verify_ledger(tmp_path).problems == ["the ledger is empty"]
    with pytest.raises(UsageError, match="hex digits"):
        verify_ledger(tmp_path, head="9f3c")
    with pytest.raises(LedgerError, match="no.* readable public key"):
        verify_ledger(tmp_path, key=tmp_path / "absent")
