"""Each loss is what its equation says: loops written from the papers, number by number."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from glasshouse.align import losses

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))


def case(shape: tuple[int, int, int]) -> tuple[torch.Generator, int, int]:
    n, t, seed = shape
    return torch.Generator().manual_seed(seed), n, t


def masks(random: torch.Generator, n: int, t: int) -> Tensor:
    """A run of ones in every row, at least one long, anywhere."""
    mask = torch.zeros(n, t)
    for row in mask:
        start = int(torch.randint(t, (), generator=random))
        row[start : start + 1 + int(torch.randint(t, (), generator=random))] = 1
    return mask


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@given(SHAPES)
def test_bradley_terry_is_cross_entropy_against_the_soft_label(shape: tuple[int, int, int]) -> None:
    random, n, _ = case(shape)
    a, b, p = (
        torch.randn(n, generator=random),
        torch.randn(n, generator=random),
        torch.rand(n, generator=random),
    )
    found = losses.bradley_terry(a, b, p)
    for i in range(n):
        q = sigmoid(float(a[i] - b[i]))
        expected = -float(p[i]) * math.log(q) - (1 - float(p[i])) * math.log(1 - q)
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)


@given(SHAPES, st.floats(0.01, 2.0))
def test_dpo_is_its_equation_and_a_label_of_one_the_original(
    shape: tuple[int, int, int], beta: float
) -> None:
    random, n, _ = case(shape)
    w, x, y, z, p = (torch.randn(n, generator=random) for _ in range(5))
    p = p.sigmoid()
    soft, hard = losses.dpo(w, x, y, z, beta, p), losses.dpo(w, x, y, z, beta)
    for i in range(n):
        h = beta * (math.log(math.exp(w[i]) / math.exp(y[i])) - math.log(math.exp(x[i]) / math.exp(z[i])))
        won, lost = -math.log(sigmoid(h)), -math.log(sigmoid(-h))
        assert float(hard[i]) == pytest.approx(won, abs=1e-5)
        assert float(soft[i]) == pytest.approx(float(p[i]) * won + (1 - float(p[i])) * lost, abs=1e-5)


@given(SHAPES, st.sampled_from(["tokens", "sequences"]), st.sampled_from([None, 0.4]))
def test_the_clipped_policy_loss_is_the_paper_s_sum(
    shape: tuple[int, int, int], over: str, high: float | None
) -> None:
    random, n, t = case(shape)
    logp, old, advantage = (torch.randn(n, t, generator=random) for _ in range(3))
    mask = masks(random, n, t)
    found = losses.ppo_clip(logp, old, advantage, mask, clip=0.2, clip_high=high, over=over)  # type: ignore[arg-type]
    rows, cut, count = [], 0, 0
    for i in range(n):
        terms = []
        for j in range(t):
            if mask[i, j]:
                ratio = math.exp(float(logp[i, j]) - float(old[i, j]))
                kept = min(max(ratio, 0.8), 1 + (high or 0.2))
                a = float(advantage[i, j])
                terms.append(min(ratio * a, kept * a))
                cut, count = cut + (kept * a < ratio * a), count + 1
        rows.append(terms)
    if over == "tokens":
        expected = -sum(map(sum, rows)) / count
    else:
        expected = -sum(sum(r) / len(r) for r in rows) / n
    assert float(found.loss) == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert float(found.clip_fraction) == pytest.approx(cut / count, abs=1e-6)


def test_a_cut_token_gives_no_gradient_and_a_free_one_that_of_the_policy_gradient() -> None:
    logp = torch.tensor([[0.0, 1.0, -1.0, 1.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, 3.0, -1.0, -1.0]])
    losses.ppo_clip(logp, torch.zeros(1, 4), advantages, torch.ones(1, 4)).loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    # ratio 1: -A / 4; raised too far with A > 0, or lowered too far with A < 0: cut; raised with A < 0: not.
    assert torch.allclose(logp.grad, torch.tensor([[-0.5, 0.0, 0.0, math.e / 4]]))


@given(SHAPES)
def test_the_value_loss_is_half_the_larger_square(shape: tuple[int, int, int]) -> None:
    random, n, t = case(shape)
    values, old, returns = (torch.randn(n, t, generator=random) for _ in range(3))
    mask = masks(random, n, t)
    found = losses.value_clip(values, old, returns, mask, clip=0.2)
    total, count = 0.0, 0
    for i in range(n):
        for j in range(t):
            if mask[i, j]:
                v, o, r = float(values[i, j]), float(old[i, j]), float(returns[i, j])
                total += 0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)
                count += 1
    assert float(found.loss) == pytest.approx(total / count, abs=1e-5, rel=1e-5)


@given(SHAPES, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_discounted_sum_of_temporal_differences(
    shape: tuple[int, int, int], gamma: float, lam: float
) -> None:
    random, n, t = case(shape)
    rewards, values = torch.randn(n, t, generator=random), torch.randn(n, t, generator=random)
    mask = masks(random, n, t)
    advantages, returns = losses.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i in range(n):
        at = [j for j in range(t) if mask[i, j]]
        v = [float(values[i, j]) for j in at] + [0.0]
        delta = [float(rewards[i, j]) + gamma * v[k + 1] - v[k] for k, j in enumerate(at)]
        for k, j in enumerate(at):
            expected = sum((gamma * lam) ** m * d for m, d in enumerate(delta[k:]))
            assert float(advantages[i, j]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[i, j]) == pytest.approx(expected + v[k], abs=1e-5)
    assert not advantages[mask == 0].any() and not returns[mask == 0].any()


def test_gae_with_lambda_one_is_what_came_after_less_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 0.25, 1.0]])
    advantages, returns = losses.gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
    assert torch.allclose(returns, torch.tensor([[3.0, 2.0, 2.0]]))
    assert torch.allclose(advantages, returns - values)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
def test_group_advantages_are_rewards_in_deviations_from_their_group(n: int, group: int, seed: int) -> None:
    rewards = torch.randn(n * group, generator=torch.Generator().manual_seed(seed))
    for scale in ("group", "none"):
        found = losses.grpo_advantages(rewards, group, scale=scale)  # type: ignore[arg-type]
        for g in range(n):
            own = [float(x) for x in rewards[g * group : (g + 1) * group]]
            mean = sum(own) / group
            by = (
                math.sqrt(sum((x - mean) ** 2 for x in own) / (group - 1)) + 1e-4 if scale == "group" else 1.0
            )
            for k in range(group):
                assert float(found[g * group + k]) == pytest.approx((own[k] - mean) / by, abs=1e-4)
    assert not losses.grpo_advantages(torch.ones(2 * group), group).any()


@pytest.mark.parametrize(("n", "group"), [(6, 4), (3, 1)])
def test_rewards_that_are_no_groups_are_refused(n: int, group: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        losses.grpo_advantages(torch.ones(n), group)


@given(SHAPES)
def test_means_and_whitening_see_what_the_mask_shows_and_nothing_else(shape: tuple[int, int, int]) -> None:
    random, n, t = case(shape)
    x, mask = torch.randn(n, t, generator=random), masks(random, n, t)
    seen = x[mask.bool()].double()
    hidden = torch.where(mask.bool(), x, torch.full_like(x, torch.inf))
    assert float(losses.masked_mean(hidden, mask)) == pytest.approx(float(seen.mean()), abs=1e-5)
    white = losses.masked_whiten(hidden, mask)
    assert not white[mask == 0].any()
    if len(seen) > 1 and float(seen.std()) > 0.01:
        expected = (seen - seen.mean()) / seen.std()
        assert torch.allclose(white[mask.bool()].double(), expected, atol=1e-4)
    assert not losses.masked_mean(x, torch.zeros_like(mask)).any()


def test_entropy_and_explained_variance_on_known_cases() -> None:
    assert float(losses.entropy_of(torch.zeros(8))) == pytest.approx(math.log(8), abs=1e-6)
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert float(losses.explained_variance(returns, returns, mask)) == pytest.approx(1.0)
    assert float(losses.explained_variance(torch.full((1, 4), 2.0), returns, mask)) == pytest.approx(0.0)
    assert math.isnan(float(losses.explained_variance(returns, torch.ones(1, 4), mask)))
