"""The gate: runs due constraints on a saved checkpoint, decides, and leaves the evidence in files."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from glasshouse.base.atomic import write_json
from glasshouse.base.config import Frozen
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import GlasshouseError, Interrupted, VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.data import Shards
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT
from glasshouse.model.hf import load_hf, save_hf
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Checkpoint, Decision, GateRecord, load_weights
from glasshouse.verify.checks import CHECKS
from glasshouse.verify.examination import Examination, Finding, error_share, settle
from glasshouse.verify.rollback import rollback_target
from glasshouse.verify.schema import Asked, Constraint
from glasshouse.verify.trace import to_quarantine, trace

log = logging.getLogger(__name__)
LADDER: tuple[Asked, ...] = get_args(Asked)


class GateConfig(Frozen):
    """How often the gate decides and how far it may go."""

    # Gates, and promotion attempts, that share a constraint's error levels evenly; see `error_share`.
    planned: int = Field(default=20, ge=1)
    attempts: int = Field(default=4, ge=1)
    quarantine_at_most: int = Field(default=1, ge=1, description="shards one rollback may drop")
    max_rollbacks: int = Field(default=3, ge=1, description="this many stop the run for a person")


@dataclass
class ConstraintGate:
    """Implements ``train.Gate``. Everything it uses is fixed before training: recipe, constraints, words."""

    constraints: tuple[Constraint, ...]
    config: GateConfig
    run: RunFolder
    tokenizer: Tokenizer
    shards: Shards
    stages: tuple[str, ...]
    recipe_digest: str
    words: tuple[str, ...]
    strays: tuple[str, ...]
    dtype: str = "fp32"  # of matrix products at gates; promotion is always judged in fp32, as it is served

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        """Judge a checkpoint; at the last gate, judge its reloaded export and promote it or not."""
        started = time.perf_counter()
        index = sum(record.gate is not None for record in history)
        export = self.export(checkpoint) if final else None
        model = load_hf(export) if export is not None else load_weights(checkpoint)
        verdicts = self.examine(model, checkpoint, history, index, final)
        decision = self.decide(model, checkpoint, history, verdicts, index, final)
        if export is not None:
            self.settle_export(export, decision)
        return self.record(checkpoint, index, decision, verdicts, time.perf_counter() - started)

    # -- checking ------------------------------------------------------------------------------------------

    def examine(
        self, model: GPT, checkpoint: Checkpoint, history: Sequence[GateRecord], index: int, final: bool
    ) -> list[dict[str, Any]]:
        """Verdicts of all due constraints, behaviours first: others may only apply when those hold."""
        due = [c for c in self.constraints if final or (c.every and index % c.every == 0)]
        measured: dict[str, float | None] = {}
        verdicts = []
        for constraint in in_order(due):
            exam = Examination(
                self.subject(model.eval(), final),
                constraint,
                (self.recipe_digest, constraint.digest(), checkpoint.digest, str(index)),
                final,
                error_share(constraint.alpha, index, self.config.planned),
                error_share(constraint.alpha, attempts_before(checkpoint, history), self.config.attempts),
                self.words,
                open_suspects(constraint.id, history),
                passes=None if final else constraint.passes,
            )
            verdict = check(exam, measured, checkpoint.digest)
            measured[constraint.id] = verdict["estimate"]
            verdicts.append(verdict)
        return verdicts

    def subject(self, model: GPT, final: bool = False) -> Subject:
        """A model ready to be asked, its passes counted from nought."""
        dtype = "fp32" if final else self.dtype
        return Subject(model, self.tokenizer, refusal_readout(self.tokenizer), self.strays, dtype)

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
        if action == "rollback":
            try:
                return self.roll_back(model, checkpoint, history, named, reason, index)
            except Interrupted:
                raise
            except Exception as problem:  # the failure stands and its evidence is kept, but a person must act
                log.exception("the data behind %s could not be traced", reason)
                return Decision("stop", f"{reason}; tracing it failed: {type(problem).__name__}: {problem}")
        if action in ("hold", "stop"):
            return Decision(action, reason)
        if final:
            return Decision("promote", "every required constraint passes on the reloaded export")
        return Decision("continue", "no constraint fails")

    def action(self, verdict: dict[str, Any], checkpoint: Checkpoint, final: bool) -> Asked:
        """What one verdict asks for."""
        constraint = next(c for c in self.constraints if c.id == verdict["constraint"])
        advisory = constraint.on_fail in ("log", "warn")
        match verdict["status"]:
            case "pass":
                return "log"
            case "fail":
                return constraint.on_fail
            case "error":
                return "log" if advisory else "hold"
            case "undecided":
                return "log" if advisory else "hold" if final else constraint.on_undecided
        required = constraint.required_from is not None and self.stages.index(
            checkpoint.stage
        ) >= self.stages.index(constraint.required_from)
        return "hold" if (required or final) and not advisory else "log"

    def roll_back(
        self,
        model: GPT,
        checkpoint: Checkpoint,
        history: tuple[GateRecord, ...],
        named: Sequence[dict[str, Any]],
        reason: str,
        index: int,
    ) -> Decision:
        """Find the data behind the first failure that shows prompts, and where to go back to."""
        shown = next((v for v in named if v["evidence"].get("failing_prompts")), None)
        if shown is None:
            return Decision("stop", f"{reason}; the failure shows no prompts to trace, so a person must look")
        failing, reference = (
            shown["evidence"]["failing_prompts"],
            shown["evidence"].get("reference_prompts", []),
        )
        before = self.before_cause(model, history, failing, reference)
        ranking = trace(
            before,
            self.shards,
            checkpoint.plan,
            checkpoint.step,
            failing,
            (self.recipe_digest, checkpoint.digest, str(index)),
        )
        dropped = to_quarantine(ranking, self.config.quarantine_at_most)
        for row in ranking["shards"]:
            row["quarantined"] = row["shard"] in dropped
        file = self.run.evals / f"attribution-{index:03d}.json"
        write_json(
            file, {"gate": index, "checkpoint": checkpoint.name, "constraint": shown["constraint"], **ranking}
        )
        target = rollback_target(history, checkpoint, dropped)
        if target is None:
            return Decision("stop", f"{reason}; no earlier checkpoint to go back to")
        return Decision(
            "rollback",
            f"{reason}; {', '.join(dropped)} ranks first behind it",
            target.name,
            dropped,
            artifacts={str(file.relative_to(self.run.path)): sha256_file(file)},
        )

    def before_cause(
        self, model: GPT, history: Sequence[GateRecord], failing: Sequence[str], reference: Sequence[str]
    ) -> Subject:
        """The latest ancestor that refuses the reference and that the failing prompts hardly move.

        Hardly: by less than a quarter of what they move the failing model. An ancestor that did not refuse
        yet has no read-out to speak of. Judged checkpoints and starts of stages are looked at, newest first;
        without a fitting one, the least moved of those that refuse is taken, and the failing model only where
        none is moved less.
        """
        failed = self.subject(model)
        if not reference:
            return failed
        stands = float(failed.margins(reference).mean())
        moved = stands - float(failed.margins(failing).mean())
        least, best = moved, failed
        for record in reversed(
            [r for r in history if r.live and (r.gate is not None or r.checkpoint.step == 0)]
        ):
            earlier = self.subject(load_weights(record.checkpoint).eval())
            stood = float(earlier.margins(reference).mean())
            if stood <= 0.5 * stands:
                continue
            shift = stood - float(earlier.margins(failing).mean())
            if shift < 0.25 * moved:
                return earlier
            if shift < least:
                least, best = shift, earlier
        return best

    # -- export and evidence -------------------------------------------------------------------------------

    def export(self, checkpoint: Checkpoint) -> Path:
        """Write the Hugging Face folder that would be served, beside the run's own files."""
        folder = self.run.path / "export.candidate"
        shutil.rmtree(folder, ignore_errors=True)
        save_hf(load_weights(checkpoint), folder)
        self.tokenizer.save(folder / "tokenizer.json")
        return folder

    def settle_export(self, candidate: Path, decision: Decision) -> None:
        """Keep a promoted export, under its name; remove any other."""
        if decision.action != "promote":
            shutil.rmtree(candidate)
            return
        final = self.run.path / "export"
        shutil.rmtree(final, ignore_errors=True)
        candidate.rename(final)

    def record(
        self,
        checkpoint: Checkpoint,
        index: int,
        decision: Decision,
        verdicts: Sequence[dict[str, Any]],
        seconds: float,
    ) -> Decision:
        """Write the verdicts with all evidence to a file; the ledger gets them short, with its digest."""
        file = self.run.evals / f"gate-{index:03d}" / "verdicts.json"
        write_json(
            file,
            {
                "gate": index,
                "checkpoint": checkpoint.name,
                "stage": checkpoint.stage,
                "step": checkpoint.step,
                "update": checkpoint.update,
                "decision": decision.action,
                "to_checkpoint": decision.to_checkpoint,
                "drop_shards": list(decision.drop_shards),
                "reason": decision.reason,
                "seconds": round(seconds, 3),
                "verdicts": list(verdicts),
            },
        )
        artifacts = {**decision.artifacts, str(file.relative_to(self.run.path)): sha256_file(file)}
        exported = self.run.path / "export"
        if decision.action == "promote":
            artifacts |= {
                str(f.relative_to(self.run.path)): sha256_file(f) for f in sorted(exported.iterdir())
            }
        return Decision(
            decision.action,
            decision.reason,
            decision.to_checkpoint,
            decision.drop_shards,
            tuple(shortened(v) for v in verdicts),
            artifacts,
        )


def in_order(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Unconditional behaviours first: other constraints may apply only when those hold."""
    return sorted(constraints, key=lambda c: c.kind != "behaviour" or c.applies_when is not None)


def check(exam: Examination, measured: dict[str, float | None], model_digest: str) -> dict[str, Any]:
    """One verdict. An exception is the verdict ``error``, which blocks: a check that broke passed nothing."""
    started, c = time.perf_counter(), exam.constraint
    try:
        finding = settle(not_applicable(exam, measured) or CHECKS[c.statistic](exam))
        if finding.estimate is not None and finding.estimate != finding.estimate:
            raise VerificationError("the estimate is NaN; nothing was measured")
    except Interrupted:
        raise
    except GlasshouseError as problem:
        finding = Finding("error", reason=str(problem))
    except Exception as problem:
        log.exception("constraint %s raised", c.id)
        finding = Finding("error", reason=f"{type(problem).__name__}: {problem}")
    return {
        "constraint": c.id,
        "kind": c.kind,
        "claim": c.claim,
        "status": finding.status,
        "statistic": c.statistic,
        "estimate": finding.estimate,
        "interval": list(finding.interval) if finding.interval is not None else None,
        "n": finding.n,
        "e_fail": finding.e_fail,
        "e_pass": finding.e_pass,
        "bound": {c.bound.side: c.bound.value},
        "alpha": c.alpha,
        "coverage": finding.coverage,
        "control": finding.control,
        "baseline": finding.baseline,
        "evidence": finding.evidence,
        "reason": finding.reason,
        "dtype": exam.subject.measured_in,
        "attention": "fused",
        "digests": {"model": model_digest, "recipe": exam.seed[0], "constraint": c.digest()},
        "seconds": round(time.perf_counter() - started, 3),
        "passes": exam.subject.passes,
    }


def not_applicable(exam: Examination, measured: dict[str, float | None]) -> Finding | None:
    """``not_applicable`` when the behaviour this constraint presupposes is not there, else None."""
    when = exam.constraint.applies_when
    if when is None:
        return None
    value = measured.get(when.behaviour)
    if value is None or value < when.at_least:
        shown = "was not measured" if value is None else f"is {value:.2f}, below {when.at_least:.2f}"
        return Finding("not_applicable", reason=f"{when.behaviour} {shown}")
    return None


def attempts_before(checkpoint: Checkpoint, history: Sequence[GateRecord]) -> int:
    """How often this place in the run was judged before: at the last step, earlier tries at promotion."""
    place = (checkpoint.stage_index, checkpoint.step)
    return sum(r.gate is not None and (r.checkpoint.stage_index, r.checkpoint.step) == place for r in history)


def open_suspects(constraint: str, history: Sequence[GateRecord]) -> tuple[str, ...]:
    """Suspects that the latest gate to look at this constraint could not clear, newest attempt included."""
    for record in reversed(history):
        for verdict in record.decision.verdicts if record.decision is not None else ():
            if verdict["constraint"] == constraint and "suspects" in verdict:
                return tuple(verdict["suspects"])
    return ()


def summary(verdict: dict[str, Any]) -> str:
    """Estimate and bound in a few words."""
    side, value = next(iter(verdict["bound"].items()))
    if verdict["estimate"] is None:
        return "no estimate"
    return f"{verdict['estimate']:.3f} (bound: {side.replace('_', ' ')} {value})"


def shortened(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict for the ledger: everything but the bulky evidence, whose file the entry names by digest."""
    kept = {k: v for k, v in verdict.items() if k not in ("evidence", "seconds", "coverage", "claim")}
    coverage = verdict["coverage"]
    if coverage is not None:
        kept["coverage"] = {k: v for k, v in coverage.items() if k != "exempt"}
    evidence = verdict["evidence"]
    kept |= {k: evidence[k] for k in ("suspects", "word", "pair") if k in evidence}
    return kept
