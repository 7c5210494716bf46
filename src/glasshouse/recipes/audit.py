"""Audit a model on disk against a constraint file: the cost first, then the verdicts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from glasshouse.base.errors import UsageError
from glasshouse.data import Shards, books, word_types, workshop
from glasshouse.evals.insertion import candidate_set
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.recipes.api import Loaded, Verdicts, locate
from glasshouse.verify import Constraint, load_constraints
from glasshouse.verify.examination import Examination
from glasshouse.verify.gate import check, in_order
from glasshouse.verify.suppression import SWEEP_GAPS, SWEEP_PROMPTS

SPEED_SAMPLE = 128  # prompts timed to turn a budget in seconds into forward passes


@dataclass
class Audit:
    """An audit that is ready to run. ``passes`` is what each constraint will cost, at most."""

    loaded: Loaded
    constraints: tuple[Constraint, ...]
    words: tuple[str, ...]
    words_from: str
    folder: Path
    seed: int
    passes: dict[str, int]
    seconds_per_pass: float
    budget_s: float | None

    @property
    def seconds(self) -> float:
        """Expected time of the whole audit without a budget."""
        return sum(self.passes.values()) * self.seconds_per_pass

    def run(self) -> Verdicts:
        """Check every constraint once; where the budget leaves something uncovered, ``undecided``."""
        verdicts, measured = Verdicts(), dict[str, float | None]()
        left = None if self.budget_s is None else int(self.budget_s / self.seconds_per_pass)
        for constraint in in_order(self.constraints):
            exam = Examination(
                Subject(self.loaded.model, self.loaded.tokenizer, refusal_readout(self.loaded.tokenizer)),
                constraint,
                ("audit", str(self.seed), constraint.digest(), self.loaded.digest),
                True,
                constraint.alpha,
                constraint.alpha,
                self.words,
                folder=self.folder,
                passes=left,
            )
            verdict = check(exam, measured, self.loaded.digest)
            if left is not None:
                left = max(0, left - verdict["passes"])
            if verdict["coverage"] is not None and constraint.words is not None:
                verdict["coverage"]["words_from"] = self.words_from
            measured[constraint.id] = verdict["estimate"]
            verdicts.append(verdict)
        return verdicts


def plan_audit(model: Path, constraints: Path, *, budget_s: float | None = None, seed: int = 0) -> Audit:
    """Load model and constraints and work out the cost. UsageError for a budget that allows no verdict."""
    if budget_s is not None and budget_s <= 0:
        raise UsageError(f"a budget of {budget_s} s allows no verdict; give for example --budget 5m")
    found, declared = locate(model), load_constraints(constraints)
    if found.tokenizer.end is None:
        raise UsageError(
            f"{model}: its tokenizer.json has no chat tokens (<|user|>, <|assistant|>, <|end|>), so requests "
            "cannot be put to it. Audits of models with other chat formats are not supported yet"
        )
    if found.run is not None:
        words, words_from = tuple(Shards.open(found.run.data).words), "the run's training text"
    else:
        words = tuple(word_types(d.text or "" for d in books.documents()))
        words_from = "the packaged books: the model's own training text is not known"
    subject = Subject(found.model, found.tokenizer, refusal_readout(found.tokenizer))
    candidates = 0
    if any(c.statistic == "suppression" for c in declared):
        candidates = len(candidate_set(subject, words, workshop.content_words()).candidates)
    passes = {c.id: expected_passes(c, candidates) for c in declared}
    text = "How do I warm the wizard's scroll? Thank you."
    subject.margins([text] * SPEED_SAMPLE)
    started = time.perf_counter()
    subject.margins([text] * SPEED_SAMPLE)
    speed = (time.perf_counter() - started) / SPEED_SAMPLE
    return Audit(found, declared, words, words_from, constraints.parent, seed, passes, speed, budget_s)


def expected_passes(constraint: Constraint, candidates: int) -> int:
    """Forward passes a full check takes at most."""
    n = constraint.prompts.n_max
    match constraint.statistic:
        case "suppression":
            return SWEEP_PROMPTS * SWEEP_GAPS * candidates + 10 * n + 1500
        case "grid_hole":
            return 4 * len(workshop.pairs(is_harmful=True)) + 8 * n
        case "ablation_effect":
            return 5 * n + 1000
        case "probe_auroc":
            return 2 * n + 500
    return 6 * n  # an answer's opening takes a pass per token


def audit(
    model: str | Path, constraints: str | Path, *, budget_s: float | None = None, seed: int = 0
) -> Verdicts:
    """Check a constraint file against a model on disk (a run, a checkpoint, a Hugging Face folder).

    Returns a list of verdicts that shows itself as a table. ``budget_s`` limits the time; what it does not
    cover is ``undecided``. Raises what ``plan_audit`` raises.
    """
    return plan_audit(Path(model), Path(constraints), budget_s=budget_s, seed=seed).run()
