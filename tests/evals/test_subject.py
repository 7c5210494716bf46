"""Asking a model in batches is asking it one by one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from evals.oracle import STRAYS, harmful, model, subject, tokenizer
from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.data import workshop
from glasshouse.evals.shared import families
from glasshouse.evals.subject import ROWS, Readout, Subject, padded_batches, refusal_readout
from glasshouse.model import Taps
from glasshouse.tokenizer import Tokenizer


def test_the_margin_is_log_odds_of_the_two_lists_of_openers() -> None:
    logits = torch.randn(5, 20)
    p = logits.softmax(-1)
    expected = (p[:, [1, 2]].sum(-1) / p[:, [7]].sum(-1)).log()
    assert torch.allclose(Readout("r", (1, 2), (7,)).margin(logits), expected, atol=1e-5)


def test_openers_that_share_a_first_token_are_refused() -> None:
    letters = Tokenizer.train(["a b"], 262)  # no merges: "Of" and "Over" begin alike, "I" is itself
    readout = refusal_readout(letters)
    assert not set(readout.positive) & set(readout.negative)

    class OneToken(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return [1]

    with pytest.raises(UsageError, match="larger vocabulary"):
        refusal_readout(OneToken.train(["a b"], 262))


@torch.no_grad()
def test_batched_margins_equal_those_of_single_rows() -> None:
    asked, s = [p.text for p in harmful(2 * ROWS + 9)], subject()
    together = s.margins(asked)
    for k in (0, 1, 17, len(asked) - 1):
        logits = model()(torch.tensor([s.ids(asked[k])]))[:, -1]
        assert together[k] == pytest.approx(float(s.readout.margin(logits)), abs=1e-4)
    assert s.passes == len(asked)


@torch.no_grad()
def test_batched_residuals_equal_those_of_single_rows() -> None:
    asked, s, site = [p.text for p in harmful(70)], subject(), "blocks.1.resid_post"
    acts = s.residuals(asked, ["blocks.0.resid_post", site])
    assert acts[site].shape == (70, 24)
    for k in (0, 33, 69):
        with Taps(read=[site]) as taps:
            model()(torch.tensor([s.ids(asked[k])]), taps)
        assert torch.allclose(acts[site][k], taps[site][0, -1], atol=1e-4)


def test_padding_keeps_every_row_once_and_points_at_its_last_token() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, size=int(n)).tolist() for n in rng.integers(1, 30, size=ROWS + 5)]
    seen = []
    for chosen, tokens, last in padded_batches(rows):
        assert len(chosen) <= ROWS
        for at, i in enumerate(chosen):
            assert tokens[at, : len(rows[i])].tolist() == rows[i]
            assert int(last[at]) == len(rows[i]) - 1
            assert tokens[at, len(rows[i]) :].eq(0).all()
            seen.append(int(i))
    assert sorted(seen) == list(range(len(rows)))
    assert padded_batches([]) == []


def test_a_model_that_gives_nan_is_an_error_and_not_a_refusal() -> None:
    broken = copy.deepcopy(model())
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    s = Subject(broken, tokenizer(), refusal_readout(tokenizer()), STRAYS)
    with pytest.raises(VerificationError, match="nothing was measured"):
        s.margins(["How do I soak the wizard's scroll?"])


def test_answers_are_text_without_special_tokens_and_are_counted() -> None:
    s = subject()
    answers = s.answers([p.text for p in harmful(3)], 4)
    assert len(answers) == 3 and s.passes == 3
    assert all("<|" not in a and a == a.strip() for a in answers)


@torch.no_grad()
def test_a_subject_asked_in_bf16_decides_the_same_and_says_so() -> None:
    """Half precision moves a margin by rounding alone; only decisions on the edge may differ."""
    asked, exact = [p.text for p in harmful(200)], subject()
    rounded = Subject(model(), tokenizer(), refusal_readout(tokenizer()), STRAYS, "bf16")
    a, b = exact.margins(asked), rounded.margins(asked)
    assert 0 < np.abs(a - b).max() < 0.05 * (1 + np.abs(a).max())
    clear = np.abs(a) > 0.1
    assert ((a > 0) == (b > 0))[clear].all()
    site = "blocks.1.resid_post"
    acts = rounded.residuals(asked[:8], [site])[site]
    assert acts.dtype == torch.float32 and not torch.equal(acts, exact.residuals(asked[:8], [site])[site])
    assert rounded.measured_in == "bfloat16" and exact.measured_in == "float32"
    assert len(rounded.answers(asked[:3], 4)) == 3


@torch.no_grad()
def test_what_was_asked_before_is_answered_without_a_pass() -> None:
    asked, s = [p.text for p in harmful(20)], subject()
    first, site = s.margins(asked), "blocks.1.resid_post"
    acts, openings = s.residuals(asked, [site])[site], s.openings(asked)
    spent = s.passes
    assert (s.margins(asked[::-1])[::-1] == first).all() and s.openings(asked) == openings
    assert torch.equal(s.residuals(asked, [site])[site], acts)
    assert s.passes == spent
    s.margins([*asked, "How do I soak the wizard's scroll today?"])
    s.residuals(asked[:3], [site, "blocks.0.resid_post"])
    assert s.passes == spent + 1 + 3


@torch.no_grad()
def test_a_model_changed_in_place_is_asked_anew() -> None:
    asked, s = [p.text for p in harmful(5)], subject()
    s.model = copy.deepcopy(s.model)
    before = s.margins(asked)
    s.model.norm.weight.mul_(1.5)
    assert np.abs(s.margins(asked) - before).max() > 1e-3


@torch.no_grad()
def test_answers_are_written_by_the_model_as_it_is_now() -> None:
    """Subjects that share their reads share its layout for writing, while no weight changes."""
    asked, changing = [p.text for p in harmful(5)], copy.deepcopy(model())
    one, other = (Subject(changing, tokenizer(), refusal_readout(tokenizer())) for _ in range(2))
    other.reads = one.reads
    before = one.answers(asked, 8)
    assert other.answers(asked, 8) == before and other.decoder is one.decoder
    changing.embed.weight.copy_(changing.embed.weight.flip(0))
    fresh = Subject(copy.deepcopy(changing), tokenizer(), refusal_readout(tokenizer()))
    assert one.answers(asked, 8) == fresh.answers(asked, 8) != before


@torch.no_grad()
def test_an_edit_is_never_answered_from_memory() -> None:
    asked, s = [p.text for p in harmful(5)], subject()
    before = s.margins(asked)
    edited = s.margins(asked, {"blocks.1.resid_post": lambda x: x + 1.0})
    assert np.abs(edited - before).max() > 1e-3
    assert (s.margins(asked) == before).all()


@torch.no_grad()
def test_rows_that_begin_alike_read_as_each_does_alone() -> None:
    """Their common prefix goes through the cache; a read-out of single rows does not."""
    s, long = subject(), "How do I soak the wizard's old scroll before the next rehearsal of the"
    asked = [
        f"{long} {w} {v}".strip() for w in ("dragon", "choir", "baker", "owl") for v in ("", "at dawn", "now")
    ]
    rows = [s.ids(p) for p in [*asked * 2, *(p.text for p in harmful(30))]]
    alike, others = families(rows)
    assert [len(members) for _, members in alike] == [24] and len(others) == 30
    together = s.margins_of_ids(rows)
    for k, row in enumerate(rows):
        logits = model()(torch.tensor([row]))[:, -1]
        assert together[k] == pytest.approx(float(s.readout.margin(logits)), abs=2e-4)


@torch.no_grad()
def test_an_opening_is_judged_like_the_whole_answer() -> None:
    asked, s = [p.text for p in harmful(40)], subject()
    for opening, answer in zip(s.openings(asked), subject().answers(asked, 6), strict=True):
        assert workshop.judge(opening) == workshop.judge(answer)
        assert answer.startswith(opening)
