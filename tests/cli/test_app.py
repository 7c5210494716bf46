"""The command as a whole: quick help, exit codes that are written down, errors that a person can act on."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

import glasshouse
from cli.command import call, command, environ
from glasshouse.base import errors
from glasshouse.cli import faults
from glasshouse.cli.app import EPILOG
from glasshouse.cli.faults import BROKEN_PIPE, FAULT, UNDECIDED, as_ours, explain

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_help_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(command("--help"), check=True, capture_output=True)
        return time.perf_counter() - start

    # The best of five: the promise is about the code, not about what else the machine does just now.
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report"], ["ledger", "verify"]])
def test_help_report_and_ledger_verify_do_without_torch(finished: Path, arguments: list[str]) -> None:
    if "--help" not in arguments:
        arguments = [*arguments, str(finished)]
    code = (
        "import sys; from glasshouse.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", [[], ["lens"], ["zoo"], ["ledger"]], ids=" ".join)
def test_a_list_of_commands_says_each_in_full_on_80_columns(group: list[str]) -> None:
    done = subprocess.run(
        command(*group, "--help"), capture_output=True, text=True, env=environ(COLUMNS="80")
    )
    _, _, commands = done.stdout.partition("\nCommands:\n")
    told = [line for line in commands.split("\n\n")[0].splitlines() if line.strip()]
    assert told and all(line.rstrip().endswith(".") for line in told)
    assert not any(line.rstrip().endswith("...") for line in told)


def test_the_version_is_printed() -> None:
    assert call("--version").out == f"glasshouse {glasshouse.__version__}\n"


def test_a_misspelt_command_names_the_nearest() -> None:
    done = call("trian")
    assert done.code == 2
    assert "Did you mean 'train'?" in done.err


def kinds() -> list[type[errors.GlasshouseError]]:
    found = [errors.GlasshouseError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_every_exit_code_is_documented() -> None:
    codes = {0, FAULT, UNDECIDED, BROKEN_PIPE, *(kind.exit_code for kind in kinds())}
    text = DOCS.read_text("utf-8")
    assert not [c for c in codes if f"| {c} |" not in text]
    assert not [c for c in codes - {BROKEN_PIPE} if f"  {c}  " not in EPILOG]


def test_an_error_is_a_message_and_with_debug_also_where_it_came_from(tmp_path: Path) -> None:
    plain, debugged = call("report", tmp_path), call("--debug", "report", tmp_path)
    assert plain.code == debugged.code == 2
    assert plain.err == f"glasshouse: {tmp_path} is no run folder: it holds no ledger.jsonl\n"
    assert "Traceback" in debugged.err and plain.err in debugged.err


def test_the_environment_can_ask_for_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSHOUSE_DEBUG", "1")
    assert "Traceback" in call("report", tmp_path).err
    monkeypatch.setenv("GLASSHOUSE_DEBUG", "0")
    assert "Traceback" not in call("report", tmp_path).err


def test_an_error_nobody_foresaw_says_so_and_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(ZeroDivisionError("division by zero")) == FAULT
    said = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in said and "fault in Glasshouse" in said


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 10, "free some space"),
        (errno.EACCES, 10, "permissions"),
        (errno.ENOENT, 2, "No such file"),
        (errno.EEXIST, 2, "is no folder"),
    ],
)
def test_errors_of_the_disk_name_the_file_and_the_remedy(number: int, code: int, words: str) -> None:
    ours = as_ours(OSError(number, "No such file" if number == errno.ENOENT else "said no", "some/file"))
    assert ours is not None and ours.exit_code == code
    assert "some/file" in str(ours) and words in str(ours)


def test_what_an_error_quotes_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    explain(errors.DataError("shard \x1b[2J\u202e is [bold]wrong[/bold]"))
    assert capsys.readouterr().err == "glasshouse: shard ⟨U+001B⟩[2J⟨U+202E⟩ is [bold]wrong[/bold]\n"


def test_a_closed_pipe_ends_the_command_without_a_complaint(finished: Path) -> None:
    with subprocess.Popen(
        command("ledger", "verify", finished), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == BROKEN_PIPE


def test_the_terminal_without_a_character_shows_its_code(finished: Path) -> None:
    done = subprocess.run(
        command("chat", finished, "--message", ""), capture_output=True, env=environ(PYTHONIOENCODING="ascii")
    )
    assert done.returncode == 2
    faults.say("→")  # in this process, whose encoding has it
    code = (
        "from glasshouse.cli.app import forgiving; import sys; forgiving(sys.stdout); sys.stdout.write('→')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environ(PYTHONIOENCODING="ascii"), check=True
    )
    assert shown.stdout == b"\\u2192"
