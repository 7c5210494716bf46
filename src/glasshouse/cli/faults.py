"""From an error to what a person reads and to the exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Any

import typer

from glasshouse.base.atomic import FULL, REFUSED
from glasshouse.base.errors import DiskError, GlasshouseError, UsageError

BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports for a program that the signal ended
UNDECIDED = 12  # an audit in which nothing failed and something could not be decided
FAULT = 70  # EX_SOFTWARE of sysexits.h: an error that is ours and not the user's
ISSUES = "the project's issue tracker"


class Debug:
    """Whether errors are shown with where they came from; set once, from --debug or the environment."""

    on = False


def explain(error: Exception) -> int:
    """Print an error for a person, on standard error, and return the exit code for it."""
    ours = as_ours(error)
    if ours is None:
        show_trace(error)
        say(
            f"glasshouse: unexpected {type(error).__name__}: {error}\n"
            f"This is a fault in Glasshouse. Please report it at {ISSUES}, with the lines above, the command "
            "and the recipe. A run that was under way can be resumed with --resume."
        )
        return FAULT
    if Debug.on:
        show_trace(error)
    say(f"glasshouse: {ours}")
    return ours.exit_code


def as_ours(error: Exception) -> GlasshouseError | None:
    """The error as one of Glasshouse's kinds, or None for one that nobody foresaw."""
    if isinstance(error, GlasshouseError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        if error.errno in FULL:
            return DiskError(
                f"no space left for {error.filename}: free some space on that disk, then run the same "
                "command again (a run goes on with --resume)"
            )
        if error.errno in REFUSED:
            return DiskError(f"{error.filename}: {error.strerror}; check who owns it and its permissions")
        if isinstance(error, FileExistsError):
            return UsageError(f"{error.filename} is there already, and is no folder; name another place")
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return UsageError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in FULL:
        return DiskError("no space left on the disk: free some, then run the same command again")
    return None


def show_trace(error: Exception) -> None:
    """Print where an error came from, on standard error."""
    say("".join(traceback.format_exception(error)).rstrip())


def say(text: str) -> None:
    """Write one message to standard error, with hidden characters made visible."""
    from glasshouse.draw.text import clean

    try:
        typer.echo(clean(text, 20_000), err=True)
    except OSError:  # standard error is closed: nobody is left to tell
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def note(text: Any) -> None:
    """Write a line about what the command does, on standard error, so that standard output stays clean."""
    say(str(text))


class ToStandardError(logging.Handler):
    """Shows the library's warnings as lines; where they came from only with --debug."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            trace = "".join(traceback.format_exception(error)).rstrip()
            text = f"{text}\n{trace}" if Debug.on else f"{text}: {error} (--debug shows where)"
        note(text)


def show_warnings() -> None:
    """Send what the library logs to standard error, once."""
    log = logging.getLogger("glasshouse")
    if not any(isinstance(h, ToStandardError) for h in log.handlers):
        log.addHandler(ToStandardError(logging.WARNING))
        log.propagate = False
