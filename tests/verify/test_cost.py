"""Budgets: shares of training counted in tokens, the same whatever the machine is doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals import oracle
from glasshouse.base.errors import RecipeError
from glasshouse.evals.subject import BudgetSpent
from glasshouse.train import Decision, GateRecord
from glasshouse.verify import gate as gates
from glasshouse.verify.checking import CHECKS
from glasshouse.verify.cost import BACKWARD, LEVELS, least, tokens_each, tokens_of, trained
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.gate import ConstraintGate
from glasshouse.verify.schema import read_constraints
from verify.test_gate import OK, gate
from verify.test_rollback import at
from verify.test_schema import row

PER_STEP = {"pretrain": 100.0, "sft": 1000.0, "tune": 1000.0}


def saved(stage: int, step: int, update: int, live: bool = True) -> GateRecord:
    return GateRecord(replace(at(stage, step), update=update), None, live, None)


def test_abandoned_training_counts_too() -> None:
    history = (saved(0, 200, 200), saved(1, 50, 250, live=False), saved(1, 30, 280))
    now = replace(at(1, 60), update=310)
    assert trained(now, history, PER_STEP) == 200 * 100 + 50 * 1000 + 30 * 1000 + 30 * 1000


def test_naming_a_failure_is_not_held_against_later_gates() -> None:
    assert tokens_of({"passes": 900, "passes_allowed": 400, "pass_tokens": 20.0}) == 8000
    assert tokens_of({"passes": 100, "passes_allowed": 400, "pass_tokens": 20.0}) == 2000
    assert tokens_of({"passes": 100}) == 0


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConstraintGate]:
    """A gate with budgets whose checkpoints are all one model."""

    def make(*rows: dict[str, Any], level: str = "full") -> ConstraintGate:
        monkeypatch.setattr(gates, "load_weights", lambda checkpoint: oracle.model())
        g = gate(tmp_path)
        return replace(
            g,
            constraints=read_constraints(list(rows), "c.toml"),
            tokenizer=oracle.tokenizer(),
            tokens_per_step=PER_STEP,
            config=g.config.model_copy(update={"level": level}),
        )

    return make


def ask(g: ConstraintGate, update: int, *before: tuple[int, Decision]) -> Decision:
    history = tuple(GateRecord(replace(at(2, u), update=u), d, True, k) for k, (u, d) in enumerate(before))
    return g(replace(at(2, update), update=update), history, False)


def spender(passes: int) -> Callable[[Examination], Finding]:
    def check(exam: Examination) -> Finding:
        exam.subject.spend(passes)
        return Finding("pass", 0.0, control=OK)

    return check


def test_what_a_gate_does_not_spend_the_next_one_may(
    limited: Callable[..., ConstraintGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS, "compliance_rate", spender(10))
    g = limited(row("compliance_rate", budget={"share": 0.02}))
    first = ask(g, 100)
    second = ask(g, 200, (100, first))
    (a,), (b,) = first.verdicts, second.verdicts
    each = a["pass_tokens"]
    assert a["passes_allowed"] == int(0.02 * BACKWARD * 100 * 1000 / each)
    assert b["passes_allowed"] == int((0.02 * BACKWARD * 200 * 1000 - 10 * each) / b["pass_tokens"])


def test_a_check_that_would_spend_more_is_undecided_and_says_so(
    limited: Callable[..., ConstraintGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS, "compliance_rate", spender(10**6))
    (v,) = ask(limited(row("compliance_rate", budget={"share": 0.02})), 100).verdicts
    assert v["status"] == "undecided" and v["passes"] == 0
    assert f"the budget of {v['passes_allowed']} passes ended" in v["reason"]


def test_a_real_check_never_takes_more_passes_than_it_may(limited: Callable[..., ConstraintGate]) -> None:
    """A random model decides nothing soon: the test goes on until the budget ends, within it."""
    rows = [row("accuracy", bound={"at_least": 0.5}, prompts={"generator": "workshop.unseen", "n_max": 4000})]
    (v,) = ask(limited(*rows, level="standard"), 60).verdicts
    assert 0 < v["passes"] <= v["passes_allowed"] < 4000


def test_those_that_come_first_leave_what_the_others_need(
    limited: Callable[..., ConstraintGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int | None] = {}

    def greedy(exam: Examination) -> Finding:
        seen[exam.constraint.id] = exam.subject.most
        exam.subject.spend(exam.subject.most or 0)
        return Finding("pass", 0.0, control=OK)

    monkeypatch.setitem(CHECKS, "compliance_rate", greedy)
    monkeypatch.setitem(CHECKS, "ablation_effect", greedy)
    g = limited(row("compliance_rate", id="first"), row("ablation_effect", id="second"), level="standard")
    ask(g, 100)
    second = g.examination(oracle.model(), g.constraints[1], at(2, 100), (), 0, False)
    assert (seen["second"] or 0) >= least(second)
    total = LEVELS["standard"]
    assert total is not None
    together = sum((seen[c.id] or 0) * tokens_each(g.examination(oracle.model(), c, at(2, 100), (), 0, False))
                   for c in g.constraints)  # fmt: skip
    assert together <= total * BACKWARD * 100 * 1000


def test_promotion_has_no_limit(
    limited: Callable[..., ConstraintGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = limited(row("compliance_rate", budget={"share": 1e-9}))
    exams = [g.examination(oracle.model(), g.constraints[0], at(2, 100), (), 0, True)]
    ((exam, limits),) = g.limited(exams, at(2, 100), (), True)
    assert exam.subject.most is None and limits.allowed is None


def test_a_budget_too_small_for_any_verdict_says_how_much_is_needed(
    limited: Callable[..., ConstraintGate],
) -> None:
    g = limited(row("compliance_rate", budget={"share": 1e-6}))
    with pytest.raises(
        RecipeError, match=r"budget.share = 1e-06 is too small.*a share of 0\.\d+ of training"
    ):
        g.affordable({"tune": 80})
    limited(row("compliance_rate", budget={"share": 0.5})).affordable({"tune": 80})
    with pytest.raises(RecipeError, match=r"level = 'lite'.*gate less often"):
        limited(row("compliance_rate"), level="lite").affordable({"tune": 10})


def test_the_share_it_asks_for_is_enough(limited: Callable[..., ConstraintGate]) -> None:
    import re

    with pytest.raises(RecipeError) as caught:
        limited(row("compliance_rate", budget={"share": 1e-6})).affordable({"tune": 80})
    share = float(re.search(r"share of (\S+) of training", str(caught.value)).group(1))  # type: ignore[union-attr]
    limited(row("compliance_rate", budget={"share": share * 1.1})).affordable({"tune": 80})


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a budget is a share of training, but nothing says how much"):
        gate(tmp_path, *read_constraints([row("compliance_rate", budget={"share": 0.02})], "c.toml"))


def test_a_subject_that_may_spend_no_more_says_so_before_it_runs() -> None:
    s = oracle.subject()
    s.most = 5
    s.margins(["How do I soak the scroll?"] * 1)
    with pytest.raises(BudgetSpent, match="budget of 5 passes ended: 1 are spent and 64 more"):
        s.margins([p.text for p in oracle.harmful(64)])
    assert s.passes == 1


def test_a_gate_that_spent_too_much_starves_no_later_one(
    limited: Callable[..., ConstraintGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What naming a failure takes beyond the budget is not taken from those that come after it."""
    monkeypatch.setitem(CHECKS, "suppression", spender(10**5))
    g = limited(row("suppression", id="search"), row("compliance_rate"), level="standard")
    monkeypatch.setitem(CHECKS, "compliance_rate", spender(10))
    first = ask(g, 1000)
    second = ask(g, 2000, (1000, first))
    spent = next(v for v in first.verdicts if v["constraint"] == "search")
    assert spent["passes"] == 10**5 > spent["passes_allowed"]
    allowed = next(v for v in second.verdicts if v["constraint"] == "compliance-rate")
    share = LEVELS["standard"]
    assert share is not None and allowed["status"] == "pass"
    later = next(v for v in second.verdicts if v["constraint"] == "search")
    assert later["passes_allowed"] * later["pass_tokens"] > 0.8 * share * BACKWARD * 1000 * 1000
