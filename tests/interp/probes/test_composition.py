"""A model that combines two words is told from one that adds them up; every part against a hand-made case."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.probes import (
    Grid,
    accuracy,
    align,
    carriers,
    combination,
    composition_report,
    interchanges,
)
from glasshouse.interp.probes.alignment import exchanged
from glasshouse.interp.probes.carriers import twins
from glasshouse.interp.probes.grid import all_margins, margins, read
from glasshouse.model import GPT
from interp.dice import thrown
from interp.probes.combos import BOTH, MATCH, WORDS, grid, grown

SITES = ["embed@a", "embed@b", "blocks.1.resid_mid"]
QUICK = {"steps": 60, "n": 160, "n_random": 2}


@pytest.fixture(scope="module")
def composer() -> tuple[GPT, Grid]:
    data = grid(MATCH)
    return grown(data, "truth", 0), data


def test_a_model_that_combines_and_one_that_adds_up_come_out_different(composer: tuple[GPT, Grid]) -> None:
    model, data = composer
    found = composition_report(model, data, SITES, **QUICK)  # type: ignore[arg-type]
    bag = composition_report(grown(data, "bag", 0, steps=120), data, SITES, **QUICK)  # type: ignore[arg-type]
    assert found.composes and not bag.composes
    assert found.unseen.low > 0.9 and bag.unseen.high < 0.7
    assert found.combination.low > 0.9 and bag.combination.high < 0.1
    assert found.parts == {"a": "embed@a", "b": "embed@b"} and found.formed == "blocks.1.resid_mid"
    site = found.sites["blocks.1.resid_mid"]
    assert site.found["both"].all.low > 0.9 and site.random["both"].high < 0.6
    assert found.shuffled["both"].all.high < 0.7
    assert bag.formed is None and set(bag.parts.values()) == {None}
    assert bag.sites["blocks.1.resid_mid"].found["both"].all.high < 0.9
    data_of = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data_of["composes"] and set(data_of["sites"]) == set(SITES)
    assert "<svg" in found._repr_html_() and "blocks.1.resid_mid" in str(found)


def test_right_answers_that_are_a_sum_over_words_are_not_called_a_combination() -> None:
    data = grid(BOTH)
    model = grown(data, "sum", 0)
    report = composition_report(model, data, ["blocks.1.resid_post"], **QUICK)  # type: ignore[arg-type]
    assert report.unseen.low > 0.9  # every answer is that of "A and B"
    assert report.combination.high < 0.2 and not report.composes


def test_combination_is_nothing_for_a_sum_and_all_for_the_truth_table() -> None:
    data, rng = grid(MATCH), np.random.default_rng(0)
    label = data.label.numpy()
    words = rng.standard_normal(WORDS)[:, None] + rng.standard_normal(WORDS)[None]
    assert combination(words, label) < 1e-12
    assert combination(7.0 * label - 3, label) == pytest.approx(1.0)
    assert combination(np.zeros_like(words), label) == 0.0
    both = grid(BOTH).label.numpy()
    assert combination(-2.0 * both, both) == pytest.approx(1.0)
    assert combination(words + 3.0 * (both - 0.5), both) < 1.0
    with pytest.raises(VerificationError, match="itself a sum"):
        combination(words, np.repeat(label[:, :1], WORDS, 1))


def test_exchanging_every_coordinate_at_a_word_is_the_run_with_that_word(composer: tuple[GPT, Grid]) -> None:
    model, data = composer
    pairs = interchanges(data, "a", 40, held=True, seed=0)
    acts = read(model, data, "embed@a")
    with torch.no_grad():
        whole = exchanged(model, data, "embed@a", pairs.base, acts[pairs.source])
        none = exchanged(model, data, "embed@a", pairs.base, acts[pairs.base])
        b, other = data.cells(pairs.base)[1], data.cells(pairs.source)[0]
        assert torch.allclose(whole, margins(model, data, other * WORDS + b), atol=1e-4)
        assert torch.allclose(none, margins(model, data, pairs.base), atol=1e-5)


@pytest.mark.parametrize("variable", ["a", "b", "both"])
def test_an_interchange_is_labelled_as_the_hypothesis_says(variable: str) -> None:
    data = grid(BOTH, seed=3)
    pairs = interchanges(data, variable, 60, held=True, seed=1)  # type: ignore[arg-type]
    assert int(pairs.moved.sum()) == 30
    columns = (x.tolist() for x in (pairs.base, pairs.source, pairs.label, pairs.moved))
    for base, source, label, moved in zip(*columns, strict=True):
        assert data.held.flatten()[base] and data.held.flatten()[source]
        i, j = (source if variable != "b" else base) // WORDS, (source if variable != "a" else base) % WORDS
        assert label == bool(data.class_a[i] and data.class_b[j])
        assert moved == (label != bool(data.class_a[base // WORDS] and data.class_b[base % WORDS]))


def test_alignment_finds_a_planted_coordinate_and_leaves_the_model_alone(composer: tuple[GPT, Grid]) -> None:
    """One embedding coordinate decides A's class in a model made for it: DAS must turn to that coordinate."""
    model, data = composer
    model = copy.deepcopy(model)
    with torch.no_grad():  # words of one class become one word, but for a coordinate of their own
        for kind in (0, 1):
            words = 5 + (data.class_a == kind).nonzero()[:, 0]
            model.embed.weight[words] = model.embed.weight[words].mean(0)
    gap = model.embed.weight[5 + (data.class_a == 1).nonzero()[0, 0]].detach().clone()
    gap -= model.embed.weight[5 + (data.class_a == 0).nonzero()[0, 0]].detach()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        found = align(model, data, "embed@a", {"a": 1}, steps=80)
    test = interchanges(data, "a", 200, held=True, seed=9)
    acts = read(model, data, "embed@a")
    assert accuracy(model, data, "embed@a", acts, found.bases["a"], test).all.value > 0.9
    assert abs(float(found.bases["a"][:, 0] @ gap / gap.norm())) > 0.6
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    joint = align(model, data, "embed@a", {"a": 2, "b": 3}, steps=2)
    basis = torch.cat([joint.bases["a"], joint.bases["b"]], 1)
    assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)


def test_components_carry_what_patching_them_by_hand_brings(composer: tuple[GPT, Grid]) -> None:
    model, data = composer
    base, source = twins(data, "a", 30, seed=0)
    assert (base % WORDS == source % WORDS).all()
    assert (data.label.flatten()[base] != data.label.flatten()[source]).all()
    found = carriers(model, data, "a", n=30)
    assert set(found) == {"a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"}
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        hook = model.blocks[0].mlp.register_forward_hook(lambda m, i, o: kept.append(o))
        x1 = margins(model, data, source)
        hook.remove()
        x0 = margins(model, data, base)
        hook = model.blocks[0].mlp.register_forward_hook(lambda m, i, o: kept[0])
        x = margins(model, data, base)
        hook.remove()
    share = float((x - x0) @ (x1 - x0) / (x1 - x0).square().sum())
    assert found["m0"].answer.value == pytest.approx(share, abs=1e-4)
    assert found["m0"].site is None


def test_a_control_hypothesis_shares_nothing_with_the_true_one() -> None:
    data = grid(MATCH)
    other = data.dealt_anew(0)
    for mine, dealt in ((data.class_a, other.class_a), (data.class_b, other.class_b)):
        assert [int(((mine == i) & (dealt == j)).sum()) for i in (0, 1) for j in (0, 1)] == [4] * 4
    assert torch.equal(other.tokens, data.tokens)


def test_rows_of_unequal_length_are_read_where_each_ends() -> None:
    rows = [[[1 + i, 9, 5 + j] + [8] * (j % 2) for j in range(4)] for i in range(4)]
    of = Grid.of(rows, [0, 1, 0, 1], [0, 0, 1, 1], MATCH, np.eye(4, dtype=bool).tolist(), [3], [5])
    model = thrown()
    found = all_margins(model, of)
    with torch.no_grad():
        for i, j in ((0, 0), (2, 1), (3, 2)):
            logits = model(torch.tensor([rows[i][j]]))[0, -1]
            assert float(found[i, j]) == pytest.approx(float(logits[3] - logits[5]), abs=1e-4)
    base, source = twins(of, "b", 100, 0)
    assert (of.at.flatten()[base] == of.at.flatten()[source]).all()


def test_bad_input_is_refused(composer: tuple[GPT, Grid]) -> None:
    model, data = composer
    with pytest.raises(UsageError, match="no site 'blocks.1.resid_pos' in this model. Did you mean"):
        composition_report(model, data, ["blocks.1.resid_pos"])
    with pytest.raises(UsageError, match="no place 'c'.* It has: a, b"):
        composition_report(model, data, ["embed@c"])
    with pytest.raises(UsageError, match="composition reads residual sites"):
        composition_report(model, data, ["blocks.0.z"])
    with pytest.raises(UsageError, match="has no 39 coordinates"):
        composition_report(model, data, ["embed@a"], widths={"a": 39})
    with pytest.raises(UsageError, match="rows have 4 tokens, but the model's context is 3"):
        composition_report(thrown(context=3), data)
    for change, problem in (
        ({"truth": torch.ones(2, 2, dtype=torch.bool)}, "same answer"),
        ({"truth": torch.tensor([[True]])}, "does not cover"),
        ({"yes": (3,)}, "none in common"),
        ({"held": torch.zeros(WORDS, WORDS, dtype=torch.bool)}, "held out"),
        ({"at": torch.zeros(3, 3, dtype=torch.int64)}, "do not fit"),
    ):
        with pytest.raises(UsageError, match=problem):
            replace(data, **change)
    few = torch.zeros(WORDS, WORDS, dtype=torch.bool)
    few[0, 0] = True
    with pytest.raises(VerificationError, match="too few held-out pairs"):
        composition_report(model, replace(data, held=few), SITES)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(VerificationError, match="NaN or infinite"):
        composition_report(broken, data, SITES)
