"""Metrics are what their formulas say, whichever rows a batch holds."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.metric import Contrast, Distance, KLDivergence, LogitDifference


def logits(n: int = 6, pos: int = 4, vocab: int = 5) -> torch.Tensor:
    return torch.randn(n, pos, vocab, generator=torch.Generator().manual_seed(0))


def test_a_logit_difference_is_read_at_each_rows_own_position() -> None:
    x, at = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    right, wrong = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 1])
    metric, rows = LogitDifference(right, wrong, at), torch.tensor([4, 1])
    expected = [float(x[r, at[r], right[r]] - x[r, at[r], wrong[r]]) for r in (4, 1)]
    assert metric(x[rows], rows).tolist() == pytest.approx(expected)
    several = LogitDifference(torch.stack([right, wrong], 1), wrong, at)
    assert several(x[rows], rows).tolist() == pytest.approx([e / 2 for e in expected])


def test_the_divergence_is_that_of_torch_and_zero_for_the_reference_itself() -> None:
    x, at = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    reference = logits(6, 1, 5)[:, 0] + 1
    metric, rows = KLDivergence(reference, at), torch.tensor([3, 5])
    p, q = reference[3].softmax(-1), x[3, 3].softmax(-1)
    assert float(metric(x[rows], rows)[0]) == pytest.approx(-float((p * (p / q).log()).sum()), abs=1e-6)
    same = KLDivergence(x[torch.arange(6), at], at)
    assert same(x, torch.arange(6)).abs().max() < 1e-6


def test_a_distance_counts_only_the_positions_it_is_told_to() -> None:
    x, mask = logits(), torch.zeros(6, 4, dtype=torch.bool)
    mask[:, 1] = True
    moved = x.clone()
    moved[:, 2] += 100.0
    assert Distance(x, mask)(moved, torch.arange(6)).abs().max() == 0
    assert bool((Distance(x)(moved, torch.arange(6)) < -2000).all())


def test_a_contrast_keeps_its_metric_with_its_rows_and_refuses_rows_that_do_not_pair() -> None:
    at = torch.tensor([0, 1, 2, 3, 0, 1])
    metric = LogitDifference(at, at.flip(0), at)
    whole = Contrast(torch.zeros(6, 4, dtype=torch.long), torch.ones(6, 4, dtype=torch.long), metric)
    even, odd = whole.halves()
    x = logits()
    everything = metric(x, torch.arange(6))
    assert torch.equal(even.metric(x[::2], torch.arange(3)), everything[::2])
    assert torch.equal(odd.rows(torch.tensor([2])).metric(x[[5]], torch.arange(1)), everything[[5]])
    with pytest.raises(UsageError, match="one shape"):
        Contrast(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long), metric)
