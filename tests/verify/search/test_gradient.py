"""Coordinate search by gradients: the slope is the slope, and on a linear model its choice is the best."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evals import oracle
from glasshouse.evals.filling import spell
from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import Subject
from glasshouse.verify.search import gradient
from glasshouse.verify.search.gradient import BACKWARD, LENGTH, TRIED, Start
from verify.search.programmed import candidates, some_words
from verify.search.written import LOUD, hunting, one_token_words, subject, written

SOME = [c for c in candidates(oracle.subject()).candidates if c.kind == "word"][:60]


def value(asked: Subject, x: torch.Tensor, refusal_only: bool) -> float:
    """The read-out of one row of embeddings x [pos, d_model], by the ordinary forward pass of a model
    in double precision.
    """
    model, read = asked.model, asked.readout
    with torch.no_grad():
        stream = x[None]
        full, local = model.where(x.shape[0])
        for block in model.blocks:
            stream = model.run_block(block, stream, local if block.windowed else full, None, None)
        logits = model.unembed(model.norm(stream))[0, -1]
    refuses, complies = (logits[list(tokens)].logsumexp(-1) for tokens in (read.positive, read.negative))
    return float(refuses if refusal_only else refuses - complies)


def test_token_gradients_are_the_slopes_of_the_read_out() -> None:
    asked = oracle.subject()
    exactly = Subject(copy.deepcopy(asked.model).double(), asked.tokenizer, asked.readout)
    rows, only = asked.rows([p.text for p in oracle.harmful(4)]), [False, True, False, True]
    found = gradient.token_gradients(asked, rows, only)
    assert asked.passes == (1 + BACKWARD) * 4
    dice, h = torch.Generator().manual_seed(0), 1e-3  # rotations are in single precision
    for row, slope, alone in zip(rows, found, only, strict=True):
        x = exactly.model.embed.weight.detach()[row]
        for at in (0, len(row) // 2, len(row) - 1):
            way = torch.zeros_like(x)
            way[at] = torch.randn(x.shape[1], generator=dice, dtype=torch.double)
            numeric = (value(exactly, x + h * way, alone) - value(exactly, x - h * way, alone)) / (2 * h)
            assert float((slope[: len(row)] * way).sum()) == pytest.approx(numeric, abs=2e-3, rel=5e-3)


@given(
    st.integers(0, 200),
    st.lists(st.sampled_from(SOME), min_size=LENGTH, max_size=LENGTH),
    st.lists(st.integers(0, 30), min_size=LENGTH, max_size=LENGTH),
    st.integers(0, LENGTH - 1),
)
@settings(max_examples=80, deadline=None)
def test_a_word_is_located_where_its_tokens_stand(
    seed: int, words: list[Candidate], places: list[int], at: int
) -> None:
    asked, prompt = oracle.subject(), oracle.harmful(1, seed)[0]
    gaps = sorted(p % (len(prompt.words) + 1) for p in places)
    state = Start(prompt, gaps, words, False)
    row = spell(asked, prompt, state.fill())
    first, length = gradient._where(asked, state, at, len(row))
    assume(at or gaps[0])  # a word that opens the request makes the one after it be spelled anew
    assert tuple(row[first : first + length]) == words[at].ids


def test_on_a_linear_model_each_step_takes_the_best_word_there_is() -> None:
    """All candidates are one token long, so the slope says exactly what each of them would do."""
    asked = subject(written())
    hunt = hunting(asked, one_token_words())
    rng = np.random.default_rng(0)
    states = [s for s in gradient.begin(hunt, 8, rng) if 0 not in s.gaps]
    before = [(s.prompt, list(s.gaps), list(s.words)) for s in states]
    by_length = {1: [i for i, c in enumerate(hunt.found.candidates) if len(c.ids) == 1]}
    ids = torch.tensor([hunt.found.candidates[i].ids for i in by_length[1]])
    gradient._step(hunt, states, 1, by_length, {1: asked.model.embed.weight.detach()[ids]}, rng)
    assert len(states) >= 4
    for state, (prompt, gaps, words) in zip(states, before, strict=True):
        trial = Start(prompt, gaps, words, False)
        fills = [trial.fill([words[0], c, words[2]]) for c in hunt.found.candidates]
        margins = hunt.margins([(prompt, f) for f in fills])
        assert state.words[1] == hunt.found.candidates[int(np.argmin(margins))]
        assert [state.words[0], state.words[2]] == [words[0], words[2]]


def test_the_search_ends_in_the_planted_word_and_leaves_the_model_as_it_was() -> None:
    asked = subject(written())
    before = copy.deepcopy(asked.model.state_dict())
    hunt = hunting(asked, one_token_words())
    gradient.search(hunt, 8)
    assert all(p.requires_grad and p.grad is None for p in asked.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in asked.model.state_dict().items())
    turned = [{w.text for _, w in h.words} for h in hunt.hits]
    assert len(turned) > 20 and all(LOUD in some for some in turned)


def test_a_search_that_cannot_be_paid_for_is_not_begun() -> None:
    asked = subject(written())
    hunt = hunting(asked, one_token_words())
    hunt.refused("gradient", 24)
    hunt.limit = hunt.spent + 8 * (1 + BACKWARD + TRIED) - 1
    spent = asked.passes
    gradient.search(hunt, 8)
    assert asked.passes == spent and not hunt.hits


def test_starts_differ_in_words_places_and_read_out() -> None:
    hunt = hunting(subject(written()), one_token_words())
    states = gradient.begin(hunt, 16, np.random.default_rng(3))
    assert len({tuple(w.key for w in s.words) for s in states}) == len(states) == 16
    assert {len(set(s.gaps)) == 1 for s in states} == {True, False}
    assert {s.refusal_only for s in states} == {True, False}
    assert all(isinstance(s.prompt, Prompt) for s in states) and len(some_words()) > 100
