"""What a check is given and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.base.plan import DataPlan
from glasshouse.base.rng import generator as rng_from
from glasshouse.base.score import Score, rate
from glasshouse.data import Shards
from glasshouse.evals.prompts import Draw, Prompt, from_file, generator
from glasshouse.evals.subject import ROWS, BudgetSpent, Subject
from glasshouse.model import GPT
from glasshouse.verify.between import BetweenTest
from glasshouse.verify.schema import Constraint, Status
from glasshouse.verify.sequential import SequentialTest, Side

BATCH = 32  # outcomes between two looks of a sequential test; looking more often would only save prompts
FIRST = 128  # most outcomes before the first look


@dataclass(frozen=True)
class Surroundings:
    """What a check may look at beside the model itself. All of it is absent when a lone model is audited.

    ``before()`` loads the last passing ancestor of the checkpoint, anew at every call. ``shards``, ``plan``
    and ``step`` say what the stage has drawn from. ``kept`` is what this constraint's last verdict asked to
    keep (`Finding.memory`), ``last`` the folder of the files it left and ``out`` the one for this gate's.
    ``places`` name that ancestor's and this checkpoint's stage and step: ``("sft@0", "sft@80")``. ``metrics``
    is the run's metrics.jsonl.
    """

    before: Callable[[], GPT] | None = None
    shards: Shards | None = None
    plan: DataPlan | None = None
    step: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)
    last: Path | None = None
    out: Path | None = None
    places: tuple[str, str] | None = None
    metrics: Path | None = None


@dataclass(frozen=True)
class Examination:
    """One constraint about to be checked on one checkpoint.

    ``seed`` is (recipe, constraint, checkpoint digest, gate index): prompts are fresh at every gate and
    the same on resume. ``alpha_fail`` and ``alpha_pass`` are this check's share of the run's error level.
    ``level`` is that of a wrong fail in the whole run, where it is not the constraint's own ``alpha``.
    ``passes`` limits the forward passes of a search (None: no limit), which then covers less.
    ``suspects`` are words earlier gates could not clear; ``words`` the word types of the training text.
    """

    subject: Subject
    constraint: Constraint
    seed: tuple[str, ...]
    final: bool
    alpha_fail: float
    alpha_pass: float
    words: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    folder: Path = Path()
    passes: int | None = None
    around: Surroundings = Surroundings()
    level: float | None = None

    @property
    def run_level(self) -> float:
        """Level of a wrong fail in the whole run."""
        return self.constraint.alpha if self.level is None else self.level

    def rng(self, purpose: str) -> np.random.Generator:
        """Randomness for one purpose; search and confirmation never share prompts."""
        return rng_from(*self.seed, purpose)

    def common(self, purpose: str) -> np.random.Generator:
        """Randomness that all constraints of a gate share, so that what they read is read once.

        Only for what no error level rests on: controls, and what directions and probes are fitted to.
        """
        mine = self.constraint.digest()
        return rng_from(*(part for part in self.seed if part != mine), "common", purpose)

    def source(self) -> Draw:
        """The constraint's prompt source. Paths are relative to the constraint file's folder."""
        spec = self.constraint.prompts
        if spec.generator is not None:
            return generator(spec.generator)
        return from_file(self.folder / str(spec.path), spec.sha256)

    def draw(self, purpose: str, n: int) -> list[Prompt]:
        """``n`` prompts for one purpose."""
        return self.source()(self.rng(purpose), n, self.subject.strays)

    def fitting(self, n: int) -> list[Prompt]:
        """``n`` prompts of the constraint's source, the same for all constraints of a gate that have it."""
        spec = self.constraint.prompts
        return self.source()(self.common(f"fit {spec.generator or spec.sha256}"), n, self.subject.strays)

    def refused(self, purpose: str, n: int) -> Refused:
        """Up to ``n`` prompts of that purpose that the model refuses."""
        return Refused(self, [p for p in self.draw(purpose, 2 * n) if p.harmful], n)

    def test(self, shares: int = 1) -> SequentialTest:
        """A sequential test of the bound; ``shares`` tests split the error level of a wrong fail."""
        bound, alpha_fail = self.constraint.bound, self.alpha_fail / max(shares, 1)
        if bound.between is not None:
            low, high = bound.between
            return BetweenTest(high, "at_most", alpha_fail, self.alpha_pass, low=low)
        side: Side = "at_most" if bound.at_most is not None else "at_least"
        return SequentialTest(bound.value, side, alpha_fail, self.alpha_pass)


@dataclass
class Refused:
    """Harmful prompts that the model refuses as they stand: ``most`` of ``asked``, each asked when needed."""

    exam: Examination
    asked: list[Prompt]
    most: int
    kept: list[Prompt] = field(default_factory=list)
    looked: int = 0

    def first(self, n: int) -> list[Prompt]:
        """The first ``n`` of them, or as many as there are."""
        while len(self.kept) < min(n, self.most) and self.looked < len(self.asked):
            part = self.asked[self.looked : self.looked + ROWS]
            self.looked += len(part)
            margins = self.exam.subject.margins([p.text for p in part])
            self.kept += [p for p, m in zip(part, margins, strict=True) if m > 0]
        return self.kept[: min(n, self.most)]


@dataclass
class Finding:
    """What a statistic found. ``status`` still ignores the control, which ``settle`` applies."""

    status: Status
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    e_fail: float | None = None
    e_pass: float | None = None
    coverage: dict[str, Any] | None = None
    control: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    memory: dict[str, Any] = field(
        default_factory=dict
    )  # small; stands in the ledger, given to the next gate
    tests: tuple[SequentialTest, ...] = ()  # of the bound, at this gate; what `detector.follow` goes on


def from_test(test: SequentialTest, **more: Any) -> Finding:
    """The finding of one sequential test, with the interval of its outcomes."""
    score = interval(test)
    more = {"tests": (test,)} | more
    return Finding(test.state, score.value, (score.low, score.high), test.n, test.e_fail, test.e_pass, **more)


def interval(test: SequentialTest) -> Score:
    """Mean and 95% score interval of a test's outcomes."""
    if test.n == 0:
        return Score(math.nan, 0.0, 1.0, 0)
    return rate(round(test.total), test.n)


def control_row(exam: Examination, value: float, n: int) -> dict[str, Any] | None:
    """How the control came out, or None when the constraint has none."""
    control = exam.constraint.control
    if control is None:
        return None
    return {
        "subject": control.subject,
        "estimate": value,
        "n": n,
        "bound": control.bound.as_row(),
        "ok": control.bound.keeps(value),
    }


def settle(finding: Finding) -> Finding:
    """Apply the control: out of bounds, the check measured something else and nothing is decided."""
    if finding.control is not None and not finding.control["ok"] and finding.status in ("pass", "fail"):
        row = finding.control
        finding.reason = (
            f"the control ({row['subject']}) is out of bounds at {row['estimate']:.3f}, so the "
            f"{finding.status} would rest on something else. {finding.reason}"
        ).strip()
        finding.status = "undecided"
    return finding


def sequentially(test: SequentialTest, outcomes: Any, n_max: int) -> SequentialTest:
    """Feed a test in batches until it decides, ``n_max`` outcomes are used or no pass is left.

    ``outcomes(start, n)`` returns up to ``n`` outcomes from position ``start`` of the stream. The first
    look is where a stream without one bad outcome passes: no earlier one could.
    """
    start, batch = 0, min(fewest(test), FIRST)
    while start < n_max and test.state == "undecided":
        try:
            part: Sequence[float] = outcomes(start, min(batch, n_max - start))
        except BudgetSpent:
            break
        start, batch = start + batch, BATCH
        if len(part):
            test.update(part)
    return test


def fewest(test: SequentialTest) -> int:
    """Outcomes after which a new test like this one passes when all of them keep the bound; at most 10,000.

    Of `between`, the middle is taken for such an outcome.
    """
    low = test.low if isinstance(test, BetweenTest) else None
    return _fewest(test.bound, test.side, test.alpha_fail, test.alpha_pass, low)


@lru_cache
def _fewest(bound: float, side: Side, alpha_fail: float, alpha_pass: float, low: float | None) -> int:
    test = SequentialTest(bound, side, alpha_fail, alpha_pass)
    kept = 0.0 if side == "at_most" else 1.0
    if low is not None:
        test, kept = BetweenTest(bound, side, alpha_fail, alpha_pass, low=low), (low + bound) / 2
    while test.state != "pass" and test.n < 10_000:
        test.update([kept])
    return test.n


def detection_floor(alpha: float, cells: int) -> float:
    """Smallest share of cells a cause must turn to be seen in one of ``cells`` with probability 1 - alpha."""
    return float(1 - alpha ** (1 / cells))


def error_share(alpha: float, k: int, planned: int) -> float:
    """The part of error level ``alpha`` that look ``k`` (from 0) may use; all looks together never exceed it.

    The ``planned`` first share evenly; unplanned ones (after rollbacks) get 1/2, 1/6, 1/12 ... of one more
    part, and so without end.
    """
    part = alpha / (planned + 1)
    late = k - planned
    return part if late < 0 else part / ((late + 1) * (late + 2))
