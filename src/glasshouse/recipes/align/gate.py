"""The gate of a run of phases, and what of a rollback it can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from glasshouse.recipes import run as running
from glasshouse.recipes.align.work import Work
from glasshouse.recipes.corpus import Material
from glasshouse.train import Checkpoint, Decision, GateRecord
from glasshouse.verify import ConstraintGate

HALF = 0.5  # of the context: what rows of the phases fill, on average, as far as budgets need to know


@dataclass
class WithinPhase:
    """A gate whose rollbacks stay within a phase: what was made between two stages came from the model at the
    first one's end, so going back behind that needs a person."""

    inner: ConstraintGate
    before: dict[str, tuple[str, int]]  # stage: the stage before it and its steps, for stages of phases

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        """What the gate decides, with a stop in place of a rollback that leaves the phase."""
        decision = self.inner(checkpoint, history, final)
        if decision.action != "rollback" or checkpoint.stage not in self.before:
            return decision
        target = next(r.checkpoint for r in history if r.checkpoint.name == decision.to_checkpoint)
        if target.stage == checkpoint.stage or (target.stage, target.step) == self.before[checkpoint.stage]:
            return decision
        return replace(
            decision,
            action="stop",
            to_checkpoint=None,
            drop_shards=(),
            repair=None,
            reason=f"{decision.reason}; the way back to {target.name} leaves the phase, whose data a later "
            "model made: begin a new run from there",
        )


def gate_for(work: Work, material: Material | None) -> WithinPhase:
    """The gate of a recipe with phases."""
    recipe = work.recipe
    tokens = {}
    if material is not None and work.grown:
        tokens = running.tokens_per_step(recipe.model_copy(update={"stage": work.grown}), material)
    context = work.align.context or int(recipe.model.get("context", 0)) or _context(work)
    later = recipe.stage[len(work.grown) :]
    tokens |= {s.name: HALF * s.batch_size * context for s in later}
    gate = ConstraintGate(
        recipe.constraint,
        recipe.gate,
        work.run,
        work.tokenizer,
        material.shards if material is not None else None,
        tuple(s.name for s in recipe.stage),
        recipe.digest(),
        work.words,
        work.strays,
        work.settings["dtype"],
        {s.name: s.spent for s in recipe.stage if s.spent},
        tokens,
        folder=work.folder,
        chat_format=work.align.chat_format,
    )
    gate.require_readable()
    gate.affordable({s.name: s.gate_every for s in recipe.stage if s.gate_every})
    names = [(s.name, s.steps) for s in recipe.stage]
    at = len(work.grown)
    return WithinPhase(gate, {names[k][0]: names[k - 1] for k in range(at, len(names)) if k})


def _context(work: Work) -> int:
    return work.start.config.context if work.start is not None else 0
