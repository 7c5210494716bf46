"""Which shards are drawn from, from which step on: the part of a batch that a gate may change.

A batch is a pure function of (seed, step, plan). A plan never changes; quarantine makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import pydantic

from glasshouse.base.config import Frozen, ReadOnlyDict
from glasshouse.base.errors import DataError, suggest


class Phase(Frozen):
    """From step `from_step` on, shard `name` is drawn with probability proportional to `weights[name]`."""

    from_step: int
    weights: Annotated[dict[str, float], pydantic.AfterValidator(ReadOnlyDict)]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the shards with weight > 0, sorted."""
        return tuple(sorted(name for name, weight in self.weights.items() if weight > 0))


class DataPlan(Frozen):
    """Phases in order of `from_step`, the first from step 0, and each shard's SHA-256 in `digests`.

    Raises `DataError` for phases out of order, a negative weight, a phase without any positive weight,
    or, when `digests` is not empty, a weighted shard without a digest.
    """

    phases: tuple[Phase, ...]
    digests: Annotated[dict[str, str], pydantic.AfterValidator(ReadOnlyDict)] = ReadOnlyDict()

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataPlan:
        starts = [phase.from_step for phase in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise DataError(f"a data plan's phases must start at step 0 and rise, got from_step = {starts}")
        for phase in self.phases:
            for name, weight in phase.weights.items():
                if weight < 0:
                    raise DataError(f"shard '{name}' has weight {weight}; weights must be at least 0")
            if not phase.active:
                raise DataError(f"no shard has a weight above 0 from step {phase.from_step} on")
            unknown = sorted(set(phase.active) - set(self.digests)) if self.digests else []
            if unknown:
                raise DataError(f"shard '{unknown[0]}' has a weight but no digest in the data plan")
        return self

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of all shards that the plan knows, drawn from or not, sorted."""
        named = {name for phase in self.phases for name in phase.weights}
        return tuple(sorted(named | set(self.digests)))

    def at(self, step: int) -> Phase:
        """Return the phase in force at `step` (>= 0)."""
        if step < 0:
            raise DataError(f"a data plan has no step {step}; steps start at 0")
        return [phase for phase in self.phases if phase.from_step <= step][-1]

    def first_step(self, shard: str) -> int | None:
        """Return the first step at which `shard` has weight > 0, or None if it never has."""
        return next((phase.from_step for phase in self.phases if phase.weights.get(shard, 0.0) > 0), None)

    def without(self, shards: Iterable[str], from_step: int) -> DataPlan:
        """Return a plan in which `shards` have weight 0 from `from_step` on; earlier steps are untouched.

        Raises `DataError` if a shard is unknown (a misspelt name would quarantine nothing) or if
        nothing would be left to draw from.
        """
        dropped = {shards} if isinstance(shards, str) else set(shards)
        for name in sorted(dropped - set(self.shards)):
            raise DataError(f"the data plan has no shard '{name}'.{suggest(name, self.shards)}")
        cut = self.at(from_step)
        phases = [phase for phase in self.phases if phase.from_step < from_step]
        later = [phase for phase in self.phases if phase.from_step > from_step]
        for start, weights in [(from_step, cut.weights), *((p.from_step, p.weights) for p in later)]:
            kept = {name: 0.0 if name in dropped else weight for name, weight in weights.items()}
            if not any(kept.values()):
                raise DataError(
                    f"without {', '.join(sorted(dropped))} no data would be left from step {start} on: "
                    "quarantine fewer shards or add clean data"
                )
            if not phases or kept != phases[-1].weights:
                phases.append(Phase(from_step=start, weights=kept))
        return DataPlan(phases=tuple(phases), digests=dict(self.digests))
