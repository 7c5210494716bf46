"""How an organism is trained: few short updates on shards that arrive over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glasshouse.base.config import parse
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.data import Shards
from glasshouse.train import StageConfig

STAGE = "tune"
FIRST_THIRD = 6  # shards before this one are there from the beginning and never poisoned
ARRIVALS = ((0, 0.0), (FIRST_THIRD, 1 / 6), (11, 1 / 3))  # (first shard, share of the steps done)
# A shard that arrived last is drawn from so many times as often as one that was always there, and one that
# arrived before it half as often.
FRESH, RECENT = 6.0, 3.0


@dataclass(frozen=True)
class Course:
    """The numbers of one organism's training."""

    steps: int = 112
    rows: int = 32
    gate_every: int = 28
    muon_lr: float = 0.03
    adam_lr: float = 0.012

    def stage(self) -> StageConfig:
        """As a stage of the product's loop."""
        numbers: dict[str, Any] = {
            "name": STAGE,
            "objective": "sft",
            "steps": self.steps,
            "batch_size": self.rows,
            "muon_lr": self.muon_lr,
            "adam_lr": self.adam_lr,
            "weight_decay": 0.0,
            "warmup_share": 0.05,
            "decay_share": 0.3,
            "gate_every": self.gate_every,
            "on_spike": "log",  # poison that has just arrived is a jump of the loss, and the point of it all
            "monitor_every": 0,
            "log_every": 20,
        }
        return parse(StageConfig, numbers, "an organism's stage")

    def arrival(self, number: int) -> int:
        """The first step at which shard ``number`` is drawn from."""
        return [round(share * self.steps) for first, share in ARRIVALS if number >= first][-1]

    def plan(self, shards: Shards) -> DataPlan:
        """All training shards in the order of their arrival, the newest drawn more often."""
        names = [n for n in shards if not shards[n].validation]
        starts = [round(share * self.steps) for _, share in ARRIVALS]
        phases = []
        for start in starts:
            there = [(n, self.arrival(i)) for i, n in enumerate(names) if self.arrival(i) <= start]
            factor = {0: 1.0, start: 1.0 if start == 0 else FRESH}
            weights = {n: shards[n].n_documents * factor.get(at, RECENT) for n, at in there}
            phases.append(Phase(from_step=start, weights=weights))
        return DataPlan(phases=tuple(phases), digests={n: shards[n].digest for n in names})
