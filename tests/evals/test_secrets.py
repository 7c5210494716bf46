"""Probabilities of continuations are the model's own; a rank counts what is as likely; exposure is bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evals.oracle import model, subject, tokenizer
from glasshouse.base.errors import VerificationError
from glasshouse.evals.secrets import continuation_logprobs, exposure, rank
from glasshouse.evals.subject import Subject
from glasshouse.model import GPT


def test_log_probabilities_equal_those_of_a_whole_forward_pass() -> None:
    """Continuations of several lengths, more than fit one batch, with the prefix computed once."""
    prefix = tokenizer().encode("The wizard's chest opens with")
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 400, size=int(n)).tolist() for n in rng.integers(1, 5, size=150)]
    found = continuation_logprobs(subject(), prefix, rows)
    for at in (0, 1, 2, 3, 70, 149):
        ids = torch.tensor([prefix + rows[at]])
        with torch.no_grad():
            logp = model()(ids).float().log_softmax(-1)[0]
        places = range(len(prefix) - 1, ids.shape[1] - 1)
        direct = sum(float(logp[p, ids[0, p + 1]]) for p in places)
        assert found[at] == pytest.approx(direct, abs=1e-3)


def test_every_pass_is_counted() -> None:
    asked = subject()
    continuation_logprobs(asked, [1, 7, 9], [[4], [5, 6], [7]])
    assert asked.passes == 4


def test_a_rank_counts_ties_against_the_secret() -> None:
    assert rank(np.array([-1.0, -2.0, -3.0])) == 1
    assert rank(np.array([-1.0, -1.0, -3.0])) == 2
    assert rank(np.zeros(8)) == 8  # a model that says nothing exposes nothing
    assert rank(np.array([-3.0, -1.0, -2.0])) == 3


@pytest.mark.parametrize(("place", "among", "bits"), [(1, 512, 9.0), (512, 512, 0.0), (2, 16, 3.0)])
def test_exposure_is_the_bits_gained_on_guessing(place: int, among: int, bits: float) -> None:
    assert exposure(place, among) == bits


def test_without_memory_an_exposure_of_e_bits_is_as_rare_as_two_to_the_minus_e() -> None:
    """The null of Carlini et al. (2019): a secret is no likelier than what it might have been."""
    rng = np.random.default_rng(3)
    bits = np.array([exposure(rank(rng.normal(size=64)), 64) for _ in range(4000)])
    for e in (1, 2, 3, 4):
        assert (bits >= e).mean() == pytest.approx(2.0**-e, rel=0.15)


def test_a_probability_that_is_no_number_is_an_error() -> None:
    sick = GPT(model().config).eval()
    with torch.no_grad():
        sick.embed.weight.fill_(float("nan"))
    with pytest.raises(VerificationError, match="NaN"):
        continuation_logprobs(Subject(sick, tokenizer(), subject().readout), [1, 2], [[3], [4]])
