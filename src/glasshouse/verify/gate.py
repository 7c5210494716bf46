"""The gate: runs due constraints on a saved checkpoint, decides, and leaves the evidence in files."""

from __future__ import annotations

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glasshouse.base.errors import GlasshouseError, Interrupted, RecipeError, suggest
from glasshouse.base.run import RunFolder
from glasshouse.data import Shards
from glasshouse.evals.chat import ChatFormat, chat_format
from glasshouse.evals.readouts import readout, subject_of
from glasshouse.evals.subject import Reads, Subject
from glasshouse.model import GPT
from glasshouse.model.hf import load_hf
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Checkpoint, Decision, GateRecord, load_weights
from glasshouse.verify.checking import as_verdict, check, in_order, presupposes, with_premises
from glasshouse.verify.cost import Limits, least, purse, tokens_each, too_small, usual
from glasshouse.verify.culprit import roll_back
from glasshouse.verify.examination import Examination, Finding, Surroundings, error_share
from glasshouse.verify.ladder import LADDER, GateConfig, asked_by, levels
from glasshouse.verify.past import (
    attempts_before,
    files_left,
    gate_folder,
    last_memory,
    last_passing,
    open_suspects,
    place,
    same_run,
    standing,
    verdict_of,
)
from glasshouse.verify.recording import export, record, settle_export, summary
from glasshouse.verify.schema import Asked, Constraint
from glasshouse.verify.spent import spent_at, unopened

log = logging.getLogger(__name__)
__all__ = ["ConstraintGate", "GateConfig", "check", "in_order"]


@dataclass
class ConstraintGate:
    """Implements ``train.Gate``. Everything it uses is fixed before training: recipe, constraints, words."""

    constraints: tuple[Constraint, ...]
    config: GateConfig
    run: RunFolder
    tokenizer: Tokenizer
    shards: Shards | None  # None: of a loop that did not show its data; failures are then not traced
    stages: tuple[str, ...]
    recipe_digest: str
    words: tuple[str, ...]
    strays: tuple[str, ...]
    dtype: str = "fp32"  # of matrix products at gates; promotion is always judged in fp32, as it is served
    # By stage: the constraints that its objective or an intervention trains against.
    uses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # By stage: tokens of one training step, of which budgets are shares; see `cost`.
    tokens_per_step: Mapping[str, float] = field(default_factory=dict)
    folder: Path = Path()  # where the paths of prompt files start
    chat_format: str | None = None  # as in `evals.chat`; None: as the tokenizer's special tokens tell
    system: str = ""  # stands before every request, as it will be served; constraints may name another

    def __post_init__(self) -> None:
        known = [c.id for c in self.constraints]
        for stage, name in ((stage, name) for stage, names in self.uses.items() for name in names):
            if name not in known:
                raise RecipeError(
                    f"stage {stage} uses {name!r}, which is no constraint.{suggest(name, known)}"
                )
        self.alphas = levels(self.constraints, self.config.alpha)
        limited = [c.id for c in self.constraints if c.budget is not None]
        self.budgets = bool(limited) or self.config.level != "full"
        if self.budgets and not self.tokens_per_step:
            what = (
                f"constraint {limited[0]}: a budget" if limited else f"[gate] level = {self.config.level!r}"
            )
            raise RecipeError(f"{what} is a share of training, but nothing says how much a step trains on")

    @cached_property
    def chat(self) -> ChatFormat:
        """How requests are put to the model."""
        return chat_format(self.tokenizer, self.chat_format, self.system)

    def require_readable(self) -> None:
        """UsageError for a constraint whose read-out is not the model's, before anything is trained."""
        for way in sorted({c.read_by for c in self.constraints if c.read_by is not None}):
            readout(way, self.tokenizer, self.chat)

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        """Judge a checkpoint; at the last gate, judge its reloaded export and promote it or not."""
        started = time.perf_counter()
        same_run(history, self.recipe_digest)
        index = sum(record.gate is not None for record in history)
        exported = export(self.run, checkpoint, self.tokenizer) if final else None
        model = load_hf(exported) if exported is not None else load_weights(checkpoint)
        verdicts = self.examine(model, checkpoint, history, index, final)
        decision = self.decide(model, checkpoint, history, verdicts, index, final)
        if exported is not None:
            settle_export(self.run, exported, decision)
        return record(self.run, checkpoint, index, decision, verdicts, time.perf_counter() - started)

    # -- checking ------------------------------------------------------------------------------------------

    def examine(
        self, model: GPT, checkpoint: Checkpoint, history: Sequence[GateRecord], index: int, final: bool
    ) -> list[dict[str, Any]]:
        """Verdicts of all due constraints, behaviours first: others may only apply when those hold."""
        due = [c for c in self.constraints if final or (c.every and index % c.every == 0)]
        spent = spent_at(checkpoint.stage, self.stages, self.uses)
        # Of this model, by read-out: what several constraints ask is answered once.
        reads: dict[str | None, Reads] = defaultdict(Reads)
        measured: dict[str, float | None] = {}
        verdicts = []
        chosen = in_order(with_premises(due, self.constraints))
        exams = [
            self.examination(model, c, checkpoint, history, index, final, reads[c.read_by]) for c in chosen
        ]
        for exam, limits in self.limited(exams, checkpoint, history, final):
            constraint = exam.constraint
            try:
                around = self.around(constraint, checkpoint, history, index)
                verdict = check(replace(exam, around=around), measured, checkpoint.digest)
                remove_if_empty(around.out)
            except Interrupted:
                raise
            except GlasshouseError as problem:  # what it should rest on is not as it was left
                verdict = as_verdict(exam, Finding("error", reason=str(problem)), checkpoint.digest, 0.0)
            measured[constraint.id] = verdict["estimate"]
            limits.settle(verdict)
            verdict |= standing(constraint.id, verdict["evidence"] | verdict, history)
            verdicts.append(verdict | ({"spent": True} if constraint.id in spent else {}))
        return verdicts

    def examination(
        self,
        model: GPT,
        constraint: Constraint,
        checkpoint: Checkpoint,
        history: Sequence[GateRecord],
        index: int,
        final: bool,
        reads: Reads | None = None,
    ) -> Examination:
        """One constraint about to be checked, as a function of checkpoint and history."""
        return Examination(
            self.subject(model.eval(), final, reads, constraint.read_by, constraint.subject.system),
            constraint,
            (self.recipe_digest, constraint.digest(), checkpoint.digest, str(index)),
            final,
            error_share(self.alphas[constraint.id], index, self.config.planned),
            error_share(constraint.alpha, attempts_before(checkpoint, history), self.config.attempts),
            self.words,
            open_suspects(constraint.id, history),
            folder=self.folder,
            passes=None if final else constraint.passes,
            level=self.alphas[constraint.id],
        )

    def affordable(self, every: Mapping[str, int]) -> None:
        """RecipeError for budgets that pay for no verdict, before anything is trained.

        ``every``: steps between the gates of each stage that has gates.
        """
        if self.budgets:
            # Nothing is asked of a model here: only the prompts' lengths count.
            exams = []
            for c in (c for c in self.constraints if c.every):
                nobody = self.subject(None, way=c.read_by, system=c.subject.system)  # type: ignore[arg-type]
                shares = (
                    error_share(self.alphas[c.id], 0, self.config.planned),
                    error_share(c.alpha, 0, self.config.attempts),
                )
                seed = (self.recipe_digest,)
                exams.append(Examination(nobody, c, seed, False, *shares, self.words, folder=self.folder))
            too_small(exams, self.config.level, every, self.tokens_per_step)

    def limited(
        self, exams: list[Examination], checkpoint: Checkpoint, history: Sequence[GateRecord], final: bool
    ) -> Iterator[tuple[Examination, Limits]]:
        """Checks in the order they are made, each with what is left for it by those before it."""
        if final or not self.budgets:
            yield from ((e, Limits(e)) for e in exams)
            return
        money = purse(self.constraints, self.config.level, checkpoint, history, self.tokens_per_step)
        each = {e.constraint.id: tokens_each(e) for e in exams}
        money.reserved = {
            e.constraint.id: least(e) * each[e.constraint.id] for e in exams if e.constraint.budget is None
        }
        exams.sort(key=lambda e: (presupposes(e.constraint), usual(e)))
        for exam in exams:
            limits = Limits(exam, money, each[exam.constraint.id])
            yield limits.exam, limits

    def around(
        self, constraint: Constraint, checkpoint: Checkpoint, history: Sequence[GateRecord], index: int
    ) -> Surroundings:
        """What the checkpoint came from, and an empty folder for what this check wants to leave.

        VerificationError when files that the last verdict left are not as they were ledgered.
        """
        out = gate_folder(self.run, index, constraint.id)
        shutil.rmtree(out, ignore_errors=True)  # of a gate that was killed
        out.mkdir(parents=True)
        passing, left = last_passing(constraint.id, history), last_memory(constraint.id, history)
        kept = (verdict_of(constraint.id, left) or {})["memory"] if left is not None else {}
        return Surroundings(
            before=None if passing is None else lambda: load_weights(passing).eval(),
            shards=self.shards,
            plan=checkpoint.plan,
            step=checkpoint.step,
            kept=kept,
            last=None if left is None else files_left(self.run, constraint.id, left),
            out=out,
            places=None if passing is None else (place(passing), place(checkpoint)),
            metrics=self.run.metrics,
        )

    def subject(
        self,
        model: GPT,
        final: bool = False,
        reads: Reads | None = None,
        way: str | None = "refusal",
        system: str | None = None,
    ) -> Subject:
        """A model ready to be asked, read by the read-out called ``way``, its passes counted from nought."""
        dtype = "fp32" if final else self.dtype
        chat = self.chat if system is None else chat_format(self.tokenizer, self.chat_format, system)
        return subject_of(model, self.tokenizer, way, strays=self.strays, dtype=dtype, reads=reads, chat=chat)

    # -- deciding ------------------------------------------------------------------------------------------

    def decide(
        self,
        model: GPT,
        checkpoint: Checkpoint,
        history: tuple[GateRecord, ...],
        verdicts: Sequence[dict[str, Any]],
        index: int,
        final: bool,
    ) -> Decision:
        """The strongest action any verdict asks for; promotion only when nothing stands against it."""
        asked = [(self.action(v, checkpoint, final), v) for v in verdicts]
        action: Asked = max((a for a, _ in asked), key=LADDER.index, default="log")
        named = [v for a, v in asked if a == action and a in ("hold", "rollback", "stop")]
        reason = "; ".join(f"{v['constraint']} {v['status']}: {v['reason'] or summary(v)}" for v in named)
        warned = [v["constraint"] for a, v in asked if a == "warn"]
        densify = self.config.densify if warned and not final else 1
        if action == "rollback":
            return replace(self.go_back(model, checkpoint, history, named, reason, index), densify=densify)
        if action in ("hold", "stop"):
            return Decision(action, reason, densify=densify)
        if not final:
            said = f"{', '.join(warned)} warns" if warned else "no constraint fails"
            return Decision("continue", said, densify=densify)
        if not verdicts:
            return Decision("hold", "no constraint was checked")
        if closed := unopened(self.constraints, verdicts):
            return Decision("hold", closed)
        return Decision("promote", "every required constraint passes on the reloaded export")

    def action(self, verdict: dict[str, Any], checkpoint: Checkpoint, final: bool) -> Asked:
        """What one verdict asks for."""
        constraint = next(c for c in self.constraints if c.id == verdict["constraint"])
        start = constraint.required_from
        required = start is not None and self.stages.index(checkpoint.stage) >= self.stages.index(start)
        return asked_by(constraint, verdict, required=required, final=final)

    def go_back(
        self,
        model: GPT,
        checkpoint: Checkpoint,
        history: tuple[GateRecord, ...],
        named: Sequence[dict[str, Any]],
        reason: str,
        index: int,
    ) -> Decision:
        """A rollback with its quarantine, or a stop where none can be worked out."""
        if self.shards is None:
            return Decision(
                "stop", f"{reason}; it cannot be traced, for the run's data was not shown: a person must look"
            )
        read_by = {c.id: c.read_by for c in self.constraints}
        under = {c.id: c.subject.system for c in self.constraints}
        named = [v for v in named if read_by[v["constraint"]] is not None]
        shown = [v for v in named if v["evidence"].get("failing_prompts")] or named
        if not shown:
            return Decision(
                "stop", f"{reason}; it reads no decision that could be traced to data: a person must look"
            )
        way, system = read_by[shown[0]["constraint"]], under[shown[0]["constraint"]]
        try:
            return roll_back(
                model,
                checkpoint,
                history,
                named,
                reason,
                run=self.run,
                gate=index,
                shards=self.shards,
                quarantine=self.config.quarantine_at_most,
                seed=(self.recipe_digest, checkpoint.digest, str(index)),
                subject=lambda model: self.subject(model, way=way, system=system),
                repairs={c.id: c.repair for c in self.constraints},
            )
        except Interrupted:
            raise
        except Exception as problem:  # the failure stands and its evidence is kept, but a person must act
            log.exception("the data behind %s could not be traced", reason)
            return Decision("stop", f"{reason}; tracing it failed: {type(problem).__name__}: {problem}")


def remove_if_empty(folder: Path | None) -> None:
    """Most checks leave no files."""
    if folder is not None and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
