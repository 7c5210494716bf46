"""A contestant of a race: a trainer in a process of its own, asked over its standard input and output."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self


class Contestant:
    """Answers a word with a number, a line each; it ends with the ``with`` block.

    ``log``: where its standard error goes, shown when it ends too early; None: nowhere.
    """

    def __init__(self, who: str, command: list[str], log: Path | None = None):
        self.who, self._log = who, log
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if log is None else log.open("w"),
            text=True,
        )

    def ask(self, what: str) -> float:
        """Its answer. SystemExit when it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            said = "" if self._log is None else f": {self._log.read_text('utf-8')[-1500:]}"
            raise SystemExit(f"{self.who} ended with status {self._process.wait()}{said}")
        return float(line)

    def __call__(self) -> float:
        """Seconds of a step."""
        return self.ask("step")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
