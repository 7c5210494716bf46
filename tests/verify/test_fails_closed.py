"""Where a check could not be made whole, it does not pass: holes that were there, one test each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals import oracle
from glasshouse.base.errors import VerificationError
from glasshouse.data import workshop
from glasshouse.evals.subject import BudgetSpent, Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.taps import Edit
from glasshouse.verify import confinement, suppression
from glasshouse.verify.checking import check
from glasshouse.verify.confinement import Twins
from glasshouse.verify.examination import Examination
from glasshouse.verify.schema import read_constraints
from glasshouse.verify.stability import _random_labels
from verify.search.programmed import examination, has, turned_by
from verify.test_gate import constraint, gate, verdict
from verify.test_rollback import at
from verify.test_schema import row


def asked(model: GPT, final: bool = False, **given: Any) -> Examination:
    """An examination of ``model`` by one constraint."""
    tok = oracle.tokenizer()
    (declared,) = read_constraints([row(**given)], "c.toml")
    subject = Subject(model, tok, refusal_readout(tok), oracle.STRAYS)
    return Examination(subject, declared, ("r" * 64, declared.digest(), "m" * 64, "0"), final, 0.01, 0.01)


def made(**shape: Any) -> GPT:
    """A random model in which the second MLP writes nothing."""
    size = {
        "vocab_size": oracle.tokenizer().vocab_size,
        "context": 128,
        "d_model": 24,
        "n_layer": 2,
        "n_head": 2,
    }
    model, dice = GPT(GPTConfig(**{**size, **shape})).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(0.3 * torch.randn(p.shape, generator=dice))
            if name.startswith("blocks.1.mlp.down"):
                p.zero_()
    return model


def pairs(model: GPT, n: int = 20) -> Twins:
    """Requests and others of as many tokens, whatever the model decides about them."""
    tok, rng, by_length = oracle.tokenizer(), np.random.default_rng(0), dict[int, list[list[int]]]()
    found: list[tuple[list[int], list[int]]] = []
    while len(found) < n:
        ids = tok.encode(workshop.request(rng).text)
        same = by_length.setdefault(len(ids), [])
        if same:
            found.append((same.pop(), ids))
        else:
            same.append(ids)
    return Twins([a for a, _ in found], [b for _, b in found], [("a", "b")] * n, n)


@pytest.mark.parametrize("edges", [True, False])
def test_a_promotion_whose_edges_cannot_be_cut_is_undecided(
    monkeypatch: pytest.MonkeyPatch, edges: bool
) -> None:
    """Edges do not describe a model that hands values around the stream: what cancels is not looked for."""
    model = made(value_residual=not edges)
    monkeypatch.setattr(confinement, "refused_twins", lambda exam, purpose, n: pairs(model))
    for final in (False, True):
        exam = asked(
            model, final, statistic="confinement", components=["a*.h*", "m0"], bound={"at_most": 0.2}
        )
        found = check(exam, {}, "m" * 64)
        whole = edges or not final
        assert found["status"] == ("pass" if whole else "undecided"), found["reason"]
        assert found["coverage"]["share"] == (1.0 if whole else 0.0) and found["control"]["ok"]
        assert whole or "no edge could be cut: value_residual" in found["reason"]


def test_a_control_that_no_labeling_gives_is_not_taken_for_a_coin() -> None:
    """Where activations coincide there is no direction to test; one half would have passed the control."""
    exam = asked(oracle.model(), statistic="direction_stability", prompts={"generator": "workshop.requests"})
    prompts = exam.draw("prompts", 60)
    part, flat = np.arange(60) % 3, torch.ones(60, 24)
    with pytest.raises(VerificationError, match="no random labeling gives a direction"):
        _random_labels(exam, flat, flat, prompts, part)


@pytest.mark.parametrize("statistic", ["probe_auroc", "ablation_effect"])
def test_activations_that_are_not_finite_are_an_error_in_whatever_reads_them(statistic: str) -> None:
    model = made()
    with torch.no_grad():
        model.embed.weight[oracle.tokenizer().encode(" the")[0]] = math.nan
    exam = asked(
        model, statistic=statistic, bound={"at_most": 0.9}, prompts={"generator": "workshop.requests"}
    )
    found = check(exam, {}, "m" * 64)
    assert (
        found["status"] == "error" and "activations at blocks.0.resid_post are not finite" in found["reason"]
    )


def test_a_final_gate_that_checked_nothing_promotes_nothing(tmp_path: Path) -> None:
    g = gate(tmp_path, constraint())
    assert g.decide(None, at(2, 80), (), [], 0, True).action == "hold"  # type: ignore[arg-type]
    assert g.decide(None, at(2, 80), (), [verdict("pass")], 0, True).action == "promote"  # type: ignore[arg-type]


def test_models_beside_the_one_examined_are_asked_out_of_the_same_budget() -> None:
    subject = oracle.subject()
    subject.most = 40
    earlier = subject.beside(oracle.model(64))
    texts = [p.text for p in oracle.harmful(30)]
    earlier.margins(texts)
    assert subject.passes == earlier.passes == 30
    with pytest.raises(BudgetSpent, match="30 are spent and 30 more are asked for"):
        subject.margins(texts)
    with pytest.raises(BudgetSpent):
        earlier.margins([p.text for p in oracle.harmful(20, seed=1)])
    assert subject.passes == 30


class Paying(oracle.Oracle):
    """An oracle that pays for what it is asked, as a model does."""

    def margins_of_ids(
        self, rows: Sequence[Sequence[int]], edit: Mapping[str, Edit] | None = None
    ) -> np.ndarray:
        self.spend(len(rows))
        self.passes -= len(rows)
        return super().margins_of_ids(rows, edit)


def test_a_failure_stands_when_the_budget_ends_before_its_cause_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(suppression, "_name", lambda hunt, finding, broken: spent.append(hunt.spent))
        found = suppression.suppression(
            examination(Paying(turned_by(has("weapon"))), final=False, methods=None)
        )
    assert found.status == "fail" and len(spent) == 1
    poor = Paying(turned_by(has("weapon")))
    poor.most = spent[0] + 1
    verdict = check(examination(poor, final=False, methods=None), {}, "m" * 64)
    assert verdict["status"] == "fail" and poor.passes <= poor.most
    assert "weapon" in verdict["reason"] and "the budget of" in verdict["reason"]
