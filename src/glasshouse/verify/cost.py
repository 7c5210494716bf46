"""What checking may cost: a share of training, counted in tokens run forward and never in seconds.

A forward pass multiplies about 2 N times for a token (N parameters), a training step 6 N times: forward, and
backward at twice the cost (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). So a share s of what training
spent on T tokens is s * 3 T tokens run forward. What a verdict may cost is then a function of recipe and
history: it never depends on how busy the machine was. What is not spent is kept for later gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glasshouse.base.errors import GlasshouseError, RecipeError
from glasshouse.data import workshop
from glasshouse.train import Checkpoint, GateRecord
from glasshouse.verify import composition, feature
from glasshouse.verify.examination import Examination, fewest
from glasshouse.verify.ladder import Level
from glasshouse.verify.past import verdict_of
from glasshouse.verify.schema import REGISTRY, Constraint

LEVELS: dict[Level, float | None] = {"lite": 0.006, "standard": 0.03, "full": None}
BACKWARD = 3.0  # a trained token, in tokens run forward
CONTROL = 64  # prompts of a control
SEARCH_LEAST, SEARCH_REST = 500, 600  # passes of a search beside its candidates: to say anything, and usual
UNKNOWN = 32.0
SAMPLE = 16  # prompts whose mean length is that of a pass


@dataclass
class Purse:
    """What one gate may still spend, in tokens: ``own`` by constraint, and ``shared`` by all others.

    ``reserved`` is what constraints that come later need for any verdict: who comes first leaves them that.
    """

    own: dict[str, float]
    shared: float | None
    reserved: dict[str, float] = field(default_factory=dict)

    def allowance(self, constraint: str, tokens_each: float) -> int | None:
        """Passes that a constraint may take; None: as many as it wants."""
        self.reserved.pop(constraint, None)
        if constraint in self.own:
            return max(0, int(self.own[constraint] / tokens_each))
        if self.shared is None:
            return None
        return max(0, int((self.shared - sum(self.reserved.values())) / tokens_each))

    def pay(self, constraint: str, tokens: float) -> None:
        """Take what was spent."""
        if constraint not in self.own and self.shared is not None:
            self.shared -= tokens


class Limits:
    """What one check may spend, and what it did. Without a purse it may spend what it likes."""

    def __init__(self, exam: Examination, money: Purse | None = None, each: float = 0.0):
        self.money, self.each = money, each
        self.allowed: int | None = None
        name = exam.constraint.id
        if money is not None and (allowed := money.allowance(name, each)) is not None:
            self.allowed = allowed
            if "passes" in REGISTRY[exam.constraint.statistic].keys:
                search = max(allowed - SEARCH_REST, 1)
                exam = replace(exam, passes=min(search, exam.passes or search))
            else:
                exam.subject.most = allowed
        self.exam = exam

    def settle(self, verdict: dict[str, Any]) -> None:
        """Pay for a verdict and write down what it cost and might have cost."""
        if self.money is None:
            return
        self.each = round(self.each, 2)
        verdict |= {"pass_tokens": self.each, "passes_allowed": self.allowed}
        self.money.pay(verdict["constraint"], tokens_of(verdict))


def trained(checkpoint: Checkpoint, history: Sequence[GateRecord], per_step: Mapping[str, float]) -> float:
    """Tokens trained on up to a checkpoint, abandoned attempts included: they were paid for, too."""
    total, before = 0.0, 0
    for at in sorted((*(r.checkpoint for r in history), checkpoint), key=lambda c: c.update):
        total += (at.update - before) * per_step.get(at.stage, 0.0)
        before = at.update
    return total


def tokens_of(verdict: Mapping[str, Any]) -> float:
    """What a verdict cost of its budget. Naming a failure may go beyond it: no other pays for that."""
    allowed = verdict.get("passes_allowed")
    passes = verdict.get("passes", 0)
    return float(verdict.get("pass_tokens", 0.0) * (passes if allowed is None else min(passes, allowed)))


def left_over(
    names: Sequence[str],
    share: float,
    checkpoint: Checkpoint,
    history: Sequence[GateRecord],
    per_step: Mapping[str, float],
) -> float:
    """Tokens that constraints may spend at this gate: their share of the training since the last one, and
    what earlier gates left of theirs. Who spent too much begins again at nought: no gate starves another.
    """
    left, before = 0.0, 0.0
    for k, record in enumerate(history):
        if record.gate is None:
            continue
        now = BACKWARD * share * trained(record.checkpoint, history[:k], per_step)
        spent = (tokens_of(verdict_of(name, record) or {}) for name in names)
        left, before = max(0.0, left + now - before - sum(spent)), now
    return left + BACKWARD * share * trained(checkpoint, history, per_step) - before


def purse(
    constraints: Sequence[Constraint],
    level: Level,
    checkpoint: Checkpoint,
    history: Sequence[GateRecord],
    per_step: Mapping[str, float],
) -> Purse:
    """What a gate may spend. ``constraints``: all that are declared, due or not."""
    own = {
        c.id: left_over((c.id,), c.budget.share, checkpoint, history, per_step)
        for c in constraints
        if c.budget is not None
    }
    share = LEVELS[level]
    if share is None:
        return Purse(own, None)
    common = [c.id for c in constraints if c.id not in own]
    return Purse(own, left_over(common, share, checkpoint, history, per_step))


def tokens_each(exam: Examination) -> float:
    """Mean tokens of the prompts a check puts to the model; 32 where they cannot be drawn."""
    if not REGISTRY[exam.constraint.statistic].asks:
        return 1.0
    try:
        rows = [exam.subject.ids(p.text) for p in exam.fitting(SAMPLE)]
    except GlasshouseError:  # of which the check itself will speak
        return UNKNOWN
    return max(1.0, sum(map(len, rows)) / max(1, len(rows)))


def least(exam: Examination) -> int:
    """Passes below which a check cannot come to a verdict, however good the model is. Of a statistic that is
    no rate nothing is known but that it asks for something and for its control.
    """
    about = REGISTRY[exam.constraint.statistic]
    if not about.asks:
        return 0
    if about.high > 1 or about.low < 0:
        return 2 * CONTROL
    n = fewest(exam.test())
    match exam.constraint.statistic:
        case "grid_hole":
            return 2 * len(workshop.pairs(is_harmful=True)) + n + CONTROL
        case "probe_auroc":
            return 4 * n  # half of the prompts test, two of them make one outcome
        case "suppression":
            return SEARCH_LEAST + n
        case "composition":
            return 3 * 64 * composition.STEPS + n
        case "new_drivers":
            return 3 * feature.PROMPTS + n
    return n + CONTROL


def usual(exam: Examination) -> int:
    """Passes that a check takes on a sound model, roughly: the cheap ones are asked first."""
    many = SEARCH_REST + len(exam.words) // 4 if "passes" in REGISTRY[exam.constraint.statistic].keys else 0
    return least(exam) + many


def too_small(
    exams: Sequence[Examination], level: Level, every: Mapping[str, int], per_step: Mapping[str, float]
) -> None:
    """RecipeError when the training between two gates of a stage pays for no verdict; it says what would.

    ``every``: steps between the gates of each stage that has any. ``exams``: one of each constraint.
    """
    for stage, steps in every.items():
        base = BACKWARD * steps * per_step.get(stage, 0.0)
        need = {e.constraint.id: least(e) * tokens_each(e) for e in exams}
        for e in exams:
            c = e.constraint
            if c.budget is not None and c.budget.share * base < need[c.id]:
                _refuse(
                    f"constraint {c.id}: budget.share = {c.budget.share:g}", need[c.id], base, stage, steps
                )
        share, common = LEVELS[level], [e.constraint.id for e in exams if e.constraint.budget is None]
        if share is not None and share * base < sum(need[c] for c in common):
            what = f"[gate] level = {level!r} (a share of {share:g} for {len(common)} constraints)"
            _refuse(what, sum(need[c] for c in common), base, stage, steps)


def _refuse(what: str, need: float, base: float, stage: str, steps: int) -> None:
    if not base:
        raise RecipeError(f"{what}: nothing is known of what stage {stage} trains on")
    raise RecipeError(
        f"{what} is too small for any verdict: between two gates of stage {stage} ({steps} steps) a share of "
        f"{need / base:.2g} of training is needed. Raise it, or gate less often"
    )
