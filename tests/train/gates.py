"""Gates for runs that are judged in another process: found by name there."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from glasshouse.base.batch import Batch
from glasshouse.base.plan import DataPlan
from glasshouse.train import Checkpoint, Decision, GateRecord
from train.tiny import ReadsTheModel, batches


@dataclass
class Waits:
    """Judges as `ReadsTheModel`, but only once training has gone past a step: it must go on meanwhile."""

    sign: Path
    at: str = "grow-000004.0"

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        until = time.monotonic() + 30
        while checkpoint.name == self.at and not self.sign.exists():
            if time.monotonic() > until:
                return Decision("stop", "training did not go on")
            time.sleep(0.01)
        return ReadsTheModel()(checkpoint, history, final)


@dataclass
class Dies:
    """Its process is gone at the second gate, whoever asks."""

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        if checkpoint.name == "grow-000008.0":
            os._exit(3)
        return Decision("promote" if final else "continue", "fine")


@dataclass
class Densifies:
    """Asks for gates twice as often at the first one."""

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        decision = ReadsTheModel()(checkpoint, history, final)
        return replace(decision, densify=2 if checkpoint.step == 4 else 1)


class CannotBeMade:
    def __init__(self) -> None:
        raise RuntimeError("no constraints here")


def signing(sign: Path, at: int):  # type: ignore[no-untyped-def]
    """Batches that leave a sign when step ``at`` is drawn."""

    def drawn(step: int, plan: DataPlan) -> Batch:
        if step == at:
            sign.touch()
        return batches(step, plan)

    return drawn
