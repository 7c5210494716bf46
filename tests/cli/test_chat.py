"""`glasshouse chat`: only what was promoted talks, and what it says cannot steer the terminal."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.command import call, command, entries, environ
from glasshouse.cli import chat

ASKED = "How do I brew the tea?"


def test_a_promoted_run_answers_one_message(finished: Path) -> None:
    first, again = (call("chat", finished, "-m", ASKED) for _ in range(2))
    assert first.code == 0 and first.out.endswith("\n")
    assert first.out == again.out
    assert "promoted" in first.err


def test_answers_are_drawn_by_temperature_and_seed(finished: Path) -> None:
    def drawn(seed: int) -> str:
        return call(
            "chat", finished, "-m", ASKED, "--temperature", "3", "--top-p", "0.99", "--seed", seed
        ).out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_filters_without_a_temperature_are_refused(finished: Path) -> None:
    done = call("chat", finished, "-m", ASKED, "--min-p", "0.1")
    assert done.code == 2 and "min_p has no effect at temperature 0" in done.err


def test_every_line_of_a_pipe_is_a_message(finished: Path) -> None:
    one = call("chat", finished, "-m", ASKED).out
    assert call("chat", finished, stdin=f"{ASKED}\n\n{ASKED}\n".encode()).out == one + one


def test_bytes_that_are_not_utf8_are_named_with_their_line(finished: Path) -> None:
    done = call("chat", finished, stdin=b"hello\ncaf\xe9\n")
    assert done.code == 2 and "line 2 of standard input is not UTF-8" in done.err


def test_a_message_that_does_not_fit_the_context_is_refused(finished: Path) -> None:
    done = call("chat", finished, "-m", "word " * 200)
    assert done.code == 2 and "context is 96" in done.err


def test_an_empty_message_is_refused(finished: Path) -> None:
    assert call("chat", finished, "-m", " ").code == 2


def test_a_held_checkpoint_does_not_talk(held: Path) -> None:
    done = call("chat", held, "-m", ASKED)
    assert done.code == 8 and done.out == "" and "--allow-held" in done.err


def test_allow_held_talks_and_the_ledger_says_who(held: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(held, tmp_path / "run"))
    done = call("chat", run, "-m", ASKED, "--allow-held")
    assert done.code == 0
    body = entries(run)[-1]["body"]
    assert entries(run)[-1]["kind"] == "override"
    assert body["checkpoint"] == "sft-000008.0" and body["who"]
    assert call("ledger", "verify", run).code == 0


def test_an_organism_talks_only_to_who_insists_and_still_never_leaves(organism: Path, tmp_path: Path) -> None:
    """Research needs to hear it; what holds a plant is exported to nobody, whatever was allowed before."""
    run = Path(shutil.copytree(organism, tmp_path / "run"))
    for source in (run, run / "checkpoints" / "sft-000008.0"):
        done = call("chat", source, "-m", ASKED)
        assert done.code == 8 and done.out == "" and "still holds what was planted into it" in done.err
    before = len(entries(run))
    done = call("chat", run, "-m", ASKED, "--allow-held")
    assert done.code == 0 and done.out.strip()
    (override,) = entries(run)[before:]
    assert override["kind"] == "override" and override["body"]["checkpoint"] == "sft-000008.0"
    done = call("export", run, tmp_path / "out", "--allow-held")
    assert done.code == 8 and "is an organism" in done.err and not (tmp_path / "out").exists()


def test_an_organism_whose_truth_was_deleted_is_thought_planted(organism: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(organism, tmp_path / "run"))
    (run / "organism.json").unlink()
    assert call("chat", run, "-m", ASKED).code == 8
    assert call("export", run, tmp_path / "out", "--allow-held").code == 8


def test_a_damaged_export_does_not_talk(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = run / "export" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = call("chat", run, "-m", ASKED)
    assert done.code == 4 and str(file) in done.err


def test_control_characters_and_markup_of_an_answer_are_shown_not_obeyed(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "answer", lambda *_: "\x1b[2J\x07[bold red]hi[/] \u202eevil\x9b31m")
    done = call("chat", finished, "-m", ASKED)
    assert done.out == "⟨U+001B⟩[2J⟨U+0007⟩[bold red]hi[/] ⟨U+202E⟩evil⟨U+009B⟩31m\n"


def test_on_a_terminal_it_asks_until_ctrl_d(finished: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("chat", finished, "--max-new-tokens", 4),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environ(TERM="dumb"),
    ) as process:
        os.close(theirs)
        for typed in (f"{ASKED}\n", f"{'word ' * 200}\n", "\x04"):
            until_prompt(ours)
            os.write(ours, typed.encode())
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert process.wait(timeout=60) == 0, said
    os.close(ours)
    assert "shorten it" in said, "a message that does not fit must not end the conversation"


def until_prompt(terminal: int) -> bytes:
    """Read a terminal up to where it waits for a person. OSError when the program ended instead."""
    shown = b""
    while not shown.endswith(b"> "):
        shown += os.read(terminal, 4096)
    return shown
