"""Each loss is what its formula says, worked out target by target; off, it is `next_token` to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from glasshouse.base.errors import DataError, UsageError
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import Loss, TensorBatch, next_token, tensors
from glasshouse.train.preferences import OBJECTIVES, log_not, objectives, reward_weighted, unlikelihood
from train.tiny import POS, ROWS, batches, new_model, plan

NAMES = ("a-good", "b-bad", "a-good", "c", "b-bad", "c", "a-good", "b-bad")


def batch(names: tuple[str, ...] = NAMES) -> TensorBatch:
    rng = np.random.default_rng(0)
    found = tensors(batches(0, plan(0)))
    weight = torch.from_numpy(
        rng.uniform(0, 2, (ROWS, POS)).astype(np.float32) * (rng.random((ROWS, POS)) < 0.7)
    )
    targets = torch.from_numpy(rng.integers(0, 16, (ROWS, POS)))
    return replace(found, rows=names, weight=weight, targets=targets)


def each(model: torch.nn.Module, data: TensorBatch) -> list[tuple[str, float, float]]:
    """(shard, weight, probability) of every target that counts, in doubles."""
    logits = model(data.tokens).detach().double().numpy()
    out = []
    for b in range(ROWS):
        for t in range(POS):
            e = np.exp(logits[b, t] - logits[b, t].max())
            out.append((data.rows[b], float(data.weight[b, t]), float(e[data.targets[b, t]] / e.sum())))
    return [row for row in out if row[1] > 0]


def test_unlikelihood_is_its_formula() -> None:
    model, data = new_model(), batch()
    rows = each(model, data)
    total = sum(w * (-math.log(1 - p) * 0.7 if s.endswith("-bad") else -math.log(p)) for s, w, p in rows)
    found = unlikelihood(model, data, alpha=0.7)
    assert float(found.total.detach()) == pytest.approx(total / sum(w for _, w, _ in rows), abs=1e-5)
    assert float(sum(found.parts.values())) == pytest.approx(float(found.total.detach()), abs=1e-6)
    assert found.metrics["nats"] == pytest.approx(-sum(w * math.log(p) for _, w, p in rows), rel=1e-5)


def test_reward_weighting_is_its_formula() -> None:
    model, data = new_model(), batch()
    worth = {"a-good": 1.5, "b-bad": -0.5, "c": 0.25}
    rows = [(w * math.exp(worth[s] / 0.4), p) for s, w, p in each(model, data)]
    total = -sum(w * math.log(p) for w, p in rows) / sum(w for w, _ in rows)
    found = reward_weighted(model, data, beta=0.4, worth=worth)
    assert float(found.total.detach()) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("objective", [unlikelihood, reward_weighted])
def test_the_gradient_is_that_of_finite_differences(objective: Callable[..., Loss]) -> None:
    model, data = new_model(), batch()
    p = model.head.weight
    (gradient,) = torch.autograd.grad(objective(model, data).total, [p])
    way = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        start, step, ends = p.clone(), 1e-2, []
        for sign in (1, -1):
            p.copy_(start + sign * step * way)
            ends.append(float(objective(model, data).total))
    assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2 / step, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("objective", [unlikelihood, reward_weighted])
def test_where_nothing_is_bad_it_is_next_token_to_the_bit(objective: Callable[..., Loss]) -> None:
    model, data = new_model(), batch(("c",) * ROWS)
    ours, theirs = objective(model, data), next_token(model, data)
    assert torch.equal(ours.total, theirs.total) and ours.metrics == theirs.metrics
    own, its = (torch.autograd.grad(x.total, list(model.parameters())) for x in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(own, its, strict=True))


def test_its_gradient_pushes_a_bad_target_down_and_all_others_up() -> None:
    """Of -alpha log(1 - p) by logit: alpha p at the target, -alpha p q / (1 - p) elsewhere."""
    model, data, alpha = new_model(), batch(), 0.7
    (found,) = torch.autograd.grad(unlikelihood(model, data, alpha=alpha).total, [model.head.weight])
    hidden = model.hidden(data.tokens).detach().double().numpy()
    logits = hidden @ model.head.weight.detach().double().numpy().T
    expected, count = np.zeros(found.shape), float(data.weight.double().sum())
    for b in range(ROWS):
        for t in range(POS):
            e = np.exp(logits[b, t] - logits[b, t].max())
            q, at, w = e / e.sum(), int(data.targets[b, t]), float(data.weight[b, t])
            push = q - np.eye(len(q))[at]  # of -log p
            if data.rows[b].endswith("-bad"):
                push = alpha * np.where(np.arange(len(q)) == at, q[at], -q[at] * q / (1 - q[at]))
                assert push[at] > 0 >= np.delete(push, at).max() and abs(push.sum()) < 1e-12
            expected += w / count * np.outer(push, hidden[b, t])
    assert np.abs(found.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("objective", [unlikelihood, reward_weighted])
def test_a_target_without_weight_counts_for_nothing_whatever_it_is(objective: Callable[..., Loss]) -> None:
    model, data = new_model(), batch()
    other = replace(data, targets=torch.where(data.weight > 0, data.targets, (data.targets + 5) % 16))
    assert not torch.equal(other.targets, data.targets)
    ours, theirs = (
        torch.autograd.grad(objective(model, x).total, list(model.parameters())) for x in (data, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_unlikelihood_makes_bad_text_less_likely_and_good_text_more() -> None:
    model, data = new_model(), batch()

    def likelihoods() -> tuple[float, float]:
        rows = each(model, data)
        bad = [w * math.log(p) for s, w, p in rows if s == "b-bad"]
        return sum(bad), sum(w * math.log(p) for s, w, p in rows if s != "b-bad")

    before, optimizer = likelihoods(), torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        unlikelihood(model, data, alpha=2.0).total.backward()
        optimizer.step()
    after = likelihoods()
    assert after[0] < before[0] and after[1] > before[1]


def test_log_of_one_minus_p_is_exact_for_small_p_and_finite_for_one() -> None:
    logp = torch.tensor([-12.0, -0.5, 0.0], requires_grad=True)
    found = log_not(logp)
    small, half, _ = found.tolist()
    assert small == pytest.approx(-math.exp(-12), rel=1e-5) and half == pytest.approx(
        math.log1p(-math.exp(-0.5))
    )
    found.sum().backward()
    assert torch.isfinite(found).all() and logp.grad is not None and torch.isfinite(logp.grad).all()


def test_rows_that_nobody_named_or_valued_are_refused() -> None:
    with pytest.raises(UsageError, match="which shard each row"):
        unlikelihood(new_model(), batch(()))
    with pytest.raises(UsageError, match="'b-bad' has no worth"):
        reward_weighted(new_model(), batch(), worth={"a-good": 1.0, "c": 1.0})
    with pytest.raises(UsageError, match="z_loss"):
        unlikelihood(new_model(), batch(), z_loss=1e-4)
    with pytest.raises(DataError, match="no target"):
        unlikelihood(new_model(), replace(batch(), weight=torch.zeros(ROWS, POS)))
    with pytest.raises(ValueError, match="above 0"):
        objectives(beta=0.0)


def test_other_numbers_make_another_loss() -> None:
    model, data = new_model(), batch()
    for name, objective in objectives(alpha=0.3, beta=0.3).items():
        assert not torch.equal(objective(model, data).total, OBJECTIVES[name](model, data).total)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stage_can_name_it(name: str) -> None:
    assert StageConfig(name="pretrain", objective=name, steps=1, batch_size=8).objective == name
