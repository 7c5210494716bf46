"""How a run is run, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from glasshouse.base.errors import UsageError
from glasshouse.train.elsewhere import Elsewhere, GateMaker
from glasshouse.train.gate import Checkpoint, Gate


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: part of the run's identity, see `identity`."""

    dtype: str = "fp32"  # "fp32" | "bf16" | "fp8": matrix products of forward and backward
    muon_dtype: str = "fp32"  # "fp32" | "bf16": Muon's orthogonalisation
    threads: int = 1
    compile: str = "off"  # "off" | "on": compiled blocks in training steps
    device: str = "cpu"  # where the model trains; gates read checkpoints on their own
    gates: str = "sync"  # "sync" | "async": judge in another process while training goes on
    max_rollbacks: int = 3  # this many rollback decisions stop the run for a person
    resume_command: str = "the same command with --resume"
    more: bool = False  # later calls go on with further stages: no checkpoint of these is the run's last


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``promoted`` is False when the final gate held the checkpoint or none was given."""

    promoted: bool
    checkpoint: Checkpoint
    reason: str
    rollbacks: int
    gates: int
    seconds: float


def worker_for(gate: Gate | None, make: GateMaker | None, settings: Settings) -> Elsewhere | None:
    """Who judges while this process trains, or None. UsageError for a way of gating that there is not."""
    if settings.gates not in ("sync", "async"):
        raise UsageError(f"gates is {settings.gates!r}: use 'sync' or 'async'")
    if gate is None or settings.gates == "sync":
        return None
    return Elsewhere(make or partial(_itself, gate), settings.threads)


def _itself(gate: Gate) -> Gate:
    return gate
