"""Asking the gate and writing down what it decides: here, or elsewhere while training goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from glasshouse.base.crash import crash_point
from glasshouse.base.errors import UsageError
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.train import checkpoint as saving
from glasshouse.train.config import Stage
from glasshouse.train.decisions import decision_body, history
from glasshouse.train.elsewhere import Elsewhere
from glasshouse.train.fold import Position, position
from glasshouse.train.gate import Checkpoint, Decision, Gate, GateRecord, ask
from glasshouse.train.records import Records
from glasshouse.train.signals import Signals


@dataclass
class Judge:
    """The gate of a run, and a worker that asks it elsewhere (None: never).

    Decisions are ledgered in the order in which they would be if every gate were waited for: before anything
    that was trained meanwhile is written down.
    """

    gate: Gate | None
    elsewhere: Elsewhere | None
    run: RunFolder
    ledger: Ledger
    stages: tuple[Stage, ...]
    records: Records
    signals: Signals
    threads: int
    max_rollbacks: int
    rows: list[dict[str, Any]] = field(default_factory=list)  # of training on, until it is known to stand

    def here(self, at: Position) -> None:
        """Ask the gate about the head, wait, and ledger what it decided; `position` does the rest."""
        if self.gate is None:
            raise UsageError(
                f"a gate is due at {at.head}, but none was given; resume with the run's own constraints"
            )
        self.records.progress.gate(at.at_head.name, at.gates)
        crash_point("gate.before")
        started = time.perf_counter()
        with self.signals.leaving_at_once():
            checkpoint, before = self.question(at)
            decision = ask(self.gate, checkpoint, before, at.at_head.last, self.shards, self.run.path)
        # A gate may have changed it, and the run's bits depend on it.
        torch.set_num_threads(self.threads)
        self.decide(at, decision, round(time.perf_counter() - started, 3))

    def begin(self, at: Position) -> None:
        """Have the head judged elsewhere, and hold back rows until it is."""
        assert self.elsewhere is not None
        if not self.judging:
            self.records.progress.gate(at.at_head.name, at.gates)
            crash_point("gate.before")
            self.elsewhere.ask(*self.question(at), self.shards, self.run.path)
        self.records.hold()

    @property
    def judging(self) -> bool:
        """Whether a gate was asked elsewhere and its decision is not in the ledger yet."""
        return self.elsewhere is not None and self.elsewhere.asked is not None

    @property
    def answered(self) -> bool:
        """Whether it has decided."""
        return self.judging and self.elsewhere is not None and self.elsewhere.ready()

    def settle(self) -> Position | None:
        """Wait for the decision of `begin` and ledger it; where to train on from, or None if not from the
        head that was judged. What was trained meanwhile then either stands (`stands`) or not (`thrown_away`).
        """
        assert self.elsewhere is not None
        if self.elsewhere.ready():
            decision, seconds = self.elsewhere.answer()
        else:
            with self.signals.leaving_at_once():
                decision, seconds = self.elsewhere.answer()
        self.rows = self.records.release()
        at = position(self.ledger.entries())
        self.decide(at, decision, seconds)
        now = position(self.ledger.entries())
        return now if (now.phase, now.head) == ("train", at.head) else None

    def stands(self) -> None:
        """Write the rows of what was trained meanwhile after the decision's, as if it had come at once."""
        self.records.append(self.rows)
        self.rows = []

    def thrown_away(self) -> None:
        """Forget them."""
        self.rows = []

    def close(self) -> None:
        """End the worker."""
        if self.elsewhere is not None:
            self.elsewhere.close()

    @property
    def shards(self) -> set[str]:
        """Names of all shards that the run's stages know."""
        return {shard for stage in self.stages for shard in stage.plan.shards}

    def question(self, at: Position) -> tuple[Checkpoint, tuple[GateRecord, ...]]:
        """What a gate is asked about: the head, and all that was before it."""
        return saving.from_ledger(self.run, at.at_head.body), history(self.run, at)

    def decide(self, at: Position, decision: Decision, seconds: float) -> None:
        """Ledger what a gate decided about the head."""
        mark = at.at_head
        crash_point("gate.after")
        body = decision_body(at, decision, self.stages, self.max_rollbacks)
        row = self.records.row(at, "gate", mark.stage_index, mark.step, at.update)
        said = {"gate": at.gates, "checkpoint": mark.name, "seconds": seconds, "decision": body["action"]}
        self.records.log(row | said | {"reason": body["reason"]})
        recorded = {"seconds": seconds} | self.records.sync()
        crash_point("decision.before-ledger")
        self.ledger.append("decision", body | recorded)
        crash_point("decision.after-ledger")
