"""Runs the command line: inside this process, where torch is loaded already, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: object, stdin: bytes | None = None) -> Done:
    """Run one command line in this process; ``stdin`` is what is piped into it."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in arguments])
    finally:
        sys.stdin = before
    return Done(code, out.getvalue(), err.getvalue())


def command(*arguments: object) -> list[str]:
    """The same as a process's arguments."""
    return [sys.executable, "-m", "glasshouse", *map(str, arguments)]


def spawn(*arguments: object, **environment: str) -> Done:
    """Run one command line as a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=100, env=environ(**environment)
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environ(**more: str) -> dict[str, str]:
    """The environment of a process of its own: one thread, no wrapped lines."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def entries(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Entries of a run's ledger."""
    found = [json.loads(line) for line in (run / "ledger.jsonl").read_text("utf-8").splitlines()]
    return [e for e in found if kind is None or e["kind"] == kind]


def weights(run: Path) -> dict[str, str]:
    """Checkpoint name to the digest of its weights, as ledgered."""
    return {
        e["body"]["checkpoint"]: next(
            d for f, d in e["body"]["artifacts"].items() if f.endswith("/model.safetensors")
        )
        for e in entries(run, "checkpoint")
    }
