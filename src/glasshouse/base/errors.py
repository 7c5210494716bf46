"""Everything that can go wrong, by kind; each kind has the exit code the command line returns.

A message names what was wrong, where, and what to do about it. The text is meant for a person.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GlasshouseError(Exception):
    """Base of every error that Glasshouse raises on purpose."""

    exit_code = 1


class UsageError(GlasshouseError):
    """The command or call was wrong: a missing file, an option that does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or constraint file has an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class DataError(GlasshouseError):
    """Documents or shards cannot be used: empty, too short, not UTF-8, digest differs."""

    exit_code = 3


class CheckpointError(GlasshouseError):
    """A checkpoint is missing, truncated, altered or does not fit the model."""

    exit_code = 4


class LedgerError(GlasshouseError):
    """The ledger was changed, is unreadable, or was written by another key."""

    exit_code = 5


class RunBusyError(GlasshouseError):
    """Another process holds the run folder."""

    exit_code = 6


class TrainingError(GlasshouseError):
    """Training cannot go on: the loss is not finite, or the run's identity changed."""

    exit_code = 7


class Halt(TrainingError):
    """A limit that the stage declares was passed: raised before an update; the loop saves and stops."""


class HeldError(GlasshouseError):
    """The checkpoint asked for was not promoted."""

    exit_code = 8


class VerificationError(GlasshouseError):
    """A check could not be carried out, so nothing may rest on it."""

    exit_code = 9


class DiskError(GlasshouseError):
    """The disk is full or refuses to be written."""

    exit_code = 10


class Stopped(GlasshouseError):
    """The run stopped itself and waits for a person's decision."""

    exit_code = 11


class Interrupted(GlasshouseError):
    """Ctrl-C: the run folder can be resumed."""

    exit_code = 130


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choice closest to `name`, or `""` if none is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean '{by_folded[close[0]]}'?" if close else ""
