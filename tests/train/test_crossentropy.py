from __future__ import annotations

import pytest
import torch

from glasshouse.train import crossentropy
from glasshouse.train.crossentropy import linear_cross_entropy, plain_cross_entropy

M, D, V = 23, 8, 31


def case(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=g, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=g)
    return hidden, head, targets, torch.rand(M, generator=g) * (torch.arange(M) % 4 > 0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_loss_and_gradients_are_those_of_the_definition(
    softcap: float | None, z_loss: float, pieces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces == "small":  # several visits, each of several slices, none of which divides the rows
        monkeypatch.setattr(crossentropy, "LOGITS_AT_ONCE", 3 * V)
        monkeypatch.setattr(crossentropy, "GRADIENTS_AT_ONCE", 7 * V)
    hidden, head, targets, weight = case(0)
    nats, square = plain_cross_entropy(hidden, head, targets, weight, softcap)
    expected = torch.autograd.grad((nats + z_loss * square) / weight.sum(), [hidden, head])
    total, got_nats, got_square = linear_cross_entropy(
        hidden, head, targets, weight, softcap=softcap, z_loss=z_loss
    )
    got = torch.autograd.grad(total / weight.sum(), [hidden, head])
    assert torch.allclose(got_nats, nats, rtol=1e-5) and torch.allclose(got_square, square, rtol=1e-5)
    assert torch.allclose(total, nats + z_loss * square, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, head, targets, weight = case(1)
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, targets, weight, softcap=3.0, z_loss=0.01)[0]

    # Sums are kept in fp32, hence the loose tolerance; a wrong formula is off by far more.
    assert torch.autograd.gradcheck(loss, wide, eps=1e-2, atol=2e-2, rtol=2e-2, raise_exception=True)


def test_in_bf16_products_are_rounded_and_nothing_else() -> None:
    hidden, head, targets, weight = case(2)
    exact, _ = plain_cross_entropy(hidden, head, targets, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _, _ = linear_cross_entropy(hidden, head, targets, weight)
        plain, _ = plain_cross_entropy(hidden, head, targets, weight)
    assert total.dtype == torch.float32
    assert torch.allclose(total, plain, rtol=1e-5)
    assert torch.allclose(total, exact, rtol=2e-2) and not torch.equal(total, exact)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(total, [hidden, head]))


def test_a_frozen_head_or_no_gradient_at_all_is_fine() -> None:
    hidden, head, targets, weight = case(3)
    with torch.no_grad():
        silent = linear_cross_entropy(hidden, head, targets, weight)[0]
    frozen = linear_cross_entropy(hidden, head.detach(), targets, weight)[0]
    assert torch.equal(silent, frozen)
    (got,) = torch.autograd.grad(frozen, [hidden])
    (expected,) = torch.autograd.grad(plain_cross_entropy(hidden, head, targets, weight)[0], [hidden])
    assert torch.allclose(got, expected, atol=1e-5)
