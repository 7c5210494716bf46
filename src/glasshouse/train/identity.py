"""What a run's bits depend on besides its recipe, and the check that a resumed run still has it.

Thread count, torch version, precision and CPU capability change the last bits of a sum, and training
amplifies them: with any of these changed, "the same run, resumed" would be a different run.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.errors import RecipeError, TrainingError, UsageError
from glasshouse.base.ledger import Ledger
from glasshouse.train.fold import position

# Other keys of the environment are recorded, but a change in them is not refused.
IDENTITY = (
    *("torch", "threads", "dtype", "muon_dtype", "compile", "device"),
    *("cpu_capability", "cpu", "machine"),
)
# What runs had that were begun before these could be chosen.
BEFORE = {"compile": "off", "device": "cpu"}


def environment(
    threads: int, dtype: str, muon_dtype: str, compile: str = "off", device: str = "cpu"
) -> dict[str, Any]:
    """This process's environment as it goes into the ledger's "run" entry (JSON values)."""
    return {
        "torch": torch.__version__,
        "threads": threads,
        "dtype": dtype,
        "muon_dtype": muon_dtype,
        "compile": compile,
        # With the card's name: another card rounds otherwise.
        "device": device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's model name (from /proc/cpuinfo on Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def check_environment(recorded: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool) -> list[str]:
    """Return what changed since the run began, as sentences; empty if nothing that matters did.

    Raises TrainingError for a change, unless ``allow_change``: then the caller ledgers the list.
    """
    recorded = BEFORE | dict(recorded)
    changes = [
        f"{key}: was {recorded.get(key)!r}, is {now.get(key)!r}"
        for key in IDENTITY
        if recorded.get(key) != now.get(key)
    ]
    if changes and not allow_change:
        raise TrainingError(
            "this machine would not continue the run bit for bit ("
            + "; ".join(changes)
            + "). Resume where it "
            "was begun, or allow the change: it is then recorded in the ledger, and the rest of the run is "
            "no longer reproducible from its beginning"
        )
    return changes


def enter_run(
    ledger: Ledger,
    *,
    recipe_digest: str,
    environment: Mapping[str, Any],
    body: Mapping[str, Any] | None = None,
    resume: bool = False,
    allow_change: bool = False,
    after_stop: str | None = None,
) -> dict[str, Any]:
    """Begin the ledger with a "run" entry, or check that a resumed run is the same one; return entry 0's
    body.

    ``body`` is added to entry 0 (constraint digests ...). ``after_stop`` says who lets a stopped run go on.
    Raises UsageError when the run exists and ``resume`` is not set, or ``after_stop`` without a stop,
    RecipeError when the recipe changed, TrainingError when the environment did.
    """
    entries = ledger.entries()
    if not entries:
        opening = {**(body or {}), "recipe": recipe_digest, "environment": dict(environment)}
        first: dict[str, Any] = ledger.append("run", opening)["body"]
        return first
    recorded: dict[str, Any] = entries[0]["body"]
    if not resume:
        raise UsageError(
            f"{ledger.path.parent} holds a run already: add --resume to go on, or name another run folder"
        )
    if recorded.get("recipe") != recipe_digest:
        raise RecipeError(
            f"the recipe changed since {ledger.path.parent} was begun (digest "
            f"{str(recorded.get('recipe'))[:16]}... then, {recipe_digest[:16]}... now): "
            "undo the change, or start a new run"
        )
    if after_stop is not None and position(entries).phase != "stopped":
        raise UsageError(
            f"{ledger.path.parent} has not stopped for a person: resume it without overriding a stop"
        )
    changes = check_environment(last_environment(entries), environment, allow_change)
    if changes or after_stop is not None:
        note: dict[str, Any] = {"changes": changes, "environment": dict(environment)}
        if after_stop is not None:
            note |= {"after_stop": True, "who": after_stop}
        ledger.append("resume", note)
    return recorded


def last_environment(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The environment that a resumed run must match: entry 0's, or the last change that was allowed."""
    found: dict[str, Any] = entries[0]["body"]["environment"]
    for entry in entries:
        if entry["kind"] == "resume" and "environment" in entry["body"]:
            found = entry["body"]["environment"]
    return found
