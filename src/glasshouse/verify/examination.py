"""What a check is given and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.base.plan import DataPlan
from glasshouse.base.rng import generator as rng_from
from glasshouse.base.score import Score, rate
from glasshouse.data import Shards
from glasshouse.evals.prompts import Draw, Prompt, from_file, generator
from glasshouse.evals.subject import Subject
from glasshouse.model import GPT
from glasshouse.verify.schema import Constraint, Status
from glasshouse.verify.sequential import SequentialTest

BATCH = 64  # outcomes between two looks of a sequential test; looking more often would only save prompts


@dataclass(frozen=True)
class Surroundings:
    """What a check may look at beside the model itself. All of it is absent when a lone model is audited.

    ``before()`` loads the last passing ancestor of the checkpoint, anew at every call. ``shards``, ``plan``
    and ``step`` say what the stage has drawn from. ``kept`` is what this constraint's last verdict asked to
    keep (`Finding.memory`), ``last`` the folder of the files it left and ``out`` the one for this gate's.
    """

    before: Callable[[], GPT] | None = None
    shards: Shards | None = None
    plan: DataPlan | None = None
    step: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)
    last: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Examination:
    """One constraint about to be checked on one checkpoint.

    ``seed`` is (recipe, constraint, checkpoint digest, gate index): prompts are fresh at every gate and
    the same on resume. ``alpha_fail`` and ``alpha_pass`` are this check's share of the run's error level.
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

    def rng(self, purpose: str) -> np.random.Generator:
        """Randomness for one purpose; search and confirmation never share prompts."""
        return rng_from(*self.seed, purpose)

    def source(self) -> Draw:
        """The constraint's prompt source. Paths are relative to the constraint file's folder."""
        spec = self.constraint.prompts
        if spec.generator is not None:
            return generator(spec.generator)
        return from_file(self.folder / str(spec.path), spec.sha256)

    def draw(self, purpose: str, n: int) -> list[Prompt]:
        """``n`` prompts for one purpose."""
        return self.source()(self.rng(purpose), n, self.subject.strays)

    def test(self, shares: int = 1) -> SequentialTest:
        """A sequential test of the bound; ``shares`` tests split the error level of a wrong fail."""
        bound = self.constraint.bound
        return SequentialTest(bound.value, bound.side, self.alpha_fail / max(shares, 1), self.alpha_pass)


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


def from_test(test: SequentialTest, **more: Any) -> Finding:
    """The finding of one sequential test, with the interval of its outcomes."""
    score = interval(test)
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
    limit = (
        {"at_most": control.bound.at_most}
        if control.bound.at_most is not None
        else {"at_least": control.bound.at_least}
    )
    return {
        "subject": control.subject,
        "estimate": value,
        "n": n,
        "bound": limit,
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
    """Feed a test in batches until it decides or ``n_max`` outcomes are used.

    ``outcomes(start, n)`` returns up to ``n`` outcomes from the stream's position ``start``.
    """
    start = 0
    while start < n_max and test.state == "undecided":
        part: Sequence[float] = outcomes(start, min(BATCH, n_max - start))
        start += BATCH
        if len(part):
            test.update(part)
    return test


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
