"""Audit a model on disk against a constraint file: the cost first, then the verdicts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glasshouse.base.chain import read_entries
from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator as rng_from
from glasshouse.data import Shards, books, word_types, workshop
from glasshouse.evals.chat import ChatFormat, chat_format
from glasshouse.evals.insertion import candidate_set
from glasshouse.evals.prompts import generator
from glasshouse.evals.readouts import ENGLISH_ANSWER, subject_of
from glasshouse.recipes.api import Loaded, Verdicts, asked_under, locate
from glasshouse.train import position
from glasshouse.train.checkpoint import from_ledger
from glasshouse.verify import Constraint, load_constraints
from glasshouse.verify.behaviour_rows import WRITTEN
from glasshouse.verify.checking import as_verdict, check, in_order, not_applicable
from glasshouse.verify.cost import CONTROL, SEARCH_REST, least
from glasshouse.verify.examination import Examination, Finding, Surroundings
from glasshouse.verify.packs import pack_file
from glasshouse.verify.past import place
from glasshouse.verify.schema import REGISTRY
from glasshouse.verify.suppression import SWEEP_GAPS, SWEEP_PROMPTS
from glasshouse.verify.weights import declare_envelope, require_envelopes

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
    chat: ChatFormat
    around: Surroundings = field(default_factory=Surroundings)

    @property
    def seconds(self) -> float:
        """Expected time of the whole audit without a budget."""
        return sum(self.passes.values()) * self.seconds_per_pass

    def exam(self, constraint: Constraint) -> Examination:
        """One constraint about to be checked, without a limit."""
        named, chat = constraint.subject.system, self.chat
        if named is not None:
            chat = chat_format(self.loaded.tokenizer, chat.name, named)
        return Examination(
            subject_of(self.loaded.model, self.loaded.tokenizer, constraint.read_by, chat=chat),
            constraint,
            ("audit", str(self.seed), constraint.digest(), self.loaded.digest),
            True,
            constraint.alpha,
            constraint.alpha,
            self.words,
            folder=self.folder,
            around=self.around,
        )

    def require_enough(self) -> None:
        """UsageError for a budget that pays for no verdict; it says how much would."""
        if self.budget_s is None:
            return
        needs = {c.id: n for c in self.constraints if (n := least(self.exam(c)))}  # 0: of what asks nothing
        if not needs:
            return
        cheapest = min(needs, key=lambda name: needs[name])
        if needs[cheapest] * self.seconds_per_pass > self.budget_s:
            raise UsageError(
                f"a budget of {self.budget_s:g} s pays for {int(self.budget_s / self.seconds_per_pass)} "
                f"forward passes of this model, and no verdict takes fewer than {needs[cheapest]} "
                f"({cheapest}): at least {needs[cheapest] * self.seconds_per_pass:.2g} s are needed, about "
                f"{self.seconds:.2g} s for all"
            )

    def run(self) -> Verdicts:
        """Check every constraint once; where the budget leaves something uncovered, ``undecided``."""
        verdicts, measured = Verdicts(), dict[str, float | None]()
        left = None if self.budget_s is None else int(self.budget_s / self.seconds_per_pass)
        for constraint in in_order(self.constraints):
            verdict = self.within(self.exam(constraint), left, measured)
            if left is not None:
                left = max(0, left - verdict["passes"])
            if verdict["coverage"] is not None and constraint.words is not None:
                verdict["coverage"]["words_from"] = self.words_from
            measured[constraint.id] = verdict["estimate"]
            verdicts.append(verdict)
        return verdicts

    def within(
        self, exam: Examination, left: int | None, measured: dict[str, float | None]
    ) -> dict[str, Any]:
        """One verdict for which ``left`` passes may be spent; where they pay for none, it says what would."""
        if left is None or not_applicable(exam, measured):
            return check(exam, measured, self.loaded.digest)
        if left < (need := least(exam)):
            said = (
                f"{left} forward passes are left of the budget, and a verdict takes at least {need}: "
                f"{(need - left) * self.seconds_per_pass:.2g} s more are needed"
            )
            return as_verdict(exam, Finding("undecided", reason=said), self.loaded.digest, 0.0)
        exam.subject.most = left
        if "passes" in REGISTRY[exam.constraint.statistic].keys:  # leaves enough to test what it finds
            exam = replace(exam, passes=max(left - SEARCH_REST, 1))
        return check(exam, measured, self.loaded.digest)


def plan_audit(
    model: Path,
    constraints: Path,
    *,
    before: Path | None = None,
    envelope: Path | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    chat: str | None = None,
) -> Audit:
    """Load model and constraints and work out the cost.

    ``before`` is the model that this one was trained from, for constraints on what changed; ``envelope`` a
    file of `recipes.envelope`, declared for constraints that lack one. ``chat`` names a format of
    `evals.chat`; None: as the tokenizer's special tokens tell. UsageError for a
    budget that allows no verdict, and for a read-out that does not belong to the model.
    """
    if budget_s is not None and budget_s <= 0:
        raise UsageError(f"a budget of {budget_s} s allows no verdict; give for example --budget 5m")
    constraints = pack_file(constraints)
    declared = load_constraints(constraints)
    if envelope is not None:
        declared = declare_envelope(declared, envelope)
    require_envelopes(declared)
    found = locate(model)
    around = Surroundings() if before is None else since(before, found)
    asked_in = chat_format(found.tokenizer, chat, asked_under(model, found))
    if found.run is not None:
        words, words_from = tuple(Shards.open(found.run.data).words), "the run's training text"
    else:
        words = tuple(word_types(d.text or "" for d in books.documents()))
        words_from = "the packaged books: the model's own training text is not known"
    where = (words, words_from, constraints.parent)
    audit = Audit(found, declared, *where, seed, {}, 0.0, budget_s, asked_in, around)
    for constraint in declared:  # what does not fit the model is said before anything is run
        exam = audit.exam(constraint)
        if constraint.prompts.path is not None:
            exam.source()
        candidates = 0
        if constraint.statistic == "suppression":
            candidates = len(candidate_set(exam.subject, words, exam.subject.readout.meaningful).candidates)
        audit.passes[constraint.id] = expected_passes(constraint, candidates)
    audit.seconds_per_pass = seconds_per_pass(audit)
    audit.require_enough()
    return audit


def since(before: Path, found: Loaded) -> Surroundings:
    """What a check sees of the model that ``found`` was trained from. UsageError for another tokenizer."""
    earlier = locate(before)
    if earlier.tokenizer.digest() != found.tokenizer.digest():
        raise UsageError(
            f"{before} has another tokenizer than {found.checkpoint}: it was not trained from it"
        )
    places = [place_of(one) for one in (earlier, found)]
    known = None if None in places else (str(places[0]), str(places[1]))
    return Surroundings(before=lambda: earlier.model, places=known)


def place_of(found: Loaded) -> str | None:
    """Stage and step of a run's checkpoint, by which envelopes name moments; None outside a run."""
    if found.run is None:
        return None
    mark = position(read_entries(found.run.ledger)).marks[found.checkpoint]
    return place(from_ledger(found.run, mark.body))


def seconds_per_pass(audit: Audit) -> float:
    """Time of one forward pass on the audit's own prompts, or on requests of the closed language."""
    subject = subject_of(audit.loaded.model, audit.loaded.tokenizer, None, chat=audit.chat)
    rng, most = rng_from("speed"), 2 * SPEED_SAMPLE
    drawn = [
        p
        for c in audit.constraints
        if c.prompts.path is not None
        for p in audit.exam(c).source()(rng, most, ())
    ]
    texts = list(dict.fromkeys(p.text for p in drawn))[:most]
    if len(texts) < 16:
        texts = [p.text for p in generator("workshop.requests")(rng, most, ())]
    room = subject.model.config.context
    texts = [t for t in texts if len(subject.ids(t)) <= room] or texts  # the check names one that is too long
    warm, timed = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    subject.margins(warm)  # what is asked twice is answered from memory
    started = time.perf_counter()
    subject.margins(timed)
    return (time.perf_counter() - started) / len(timed)


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
        case "preference_rate" | "swayed_rate":
            return 6 * (n + CONTROL)  # a prompt and its two choices, twice where an opinion is compared
        case "forbidden_rate":
            return (n + CONTROL) * WRITTEN
    if constraint.subject.readout == "refusal-english":
        return (n + CONTROL) * ENGLISH_ANSWER
    return 6 * n  # an answer's opening takes a pass per token


def audit(
    model: str | Path,
    constraints: str | Path,
    *,
    before: str | Path | None = None,
    envelope: str | Path | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    chat_format: str | None = None,
) -> Verdicts:
    """Check a constraint file against a model on disk (a run, a checkpoint, a Hugging Face folder).

    Returns a list of verdicts that shows itself as a table. ``budget_s`` limits the time; what it does not
    cover is ``undecided``. ``chat_format`` says how requests are put (`evals.chat`; None: as the tokenizer's
    special tokens tell). ``before``, the model it was trained from, is what constraints on changes compare
    with, ``envelope`` what `update_outlier` does. Raises what ``plan_audit`` raises.
    """
    return plan_audit(
        Path(model),
        Path(constraints),
        before=None if before is None else Path(before),
        envelope=None if envelope is None else Path(envelope),
        budget_s=budget_s,
        seed=seed,
        chat=chat_format,
    ).run()
