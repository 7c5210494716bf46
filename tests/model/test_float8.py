"""FP8 on a CPU: slow, and the same numbers as on a GPU that multiplies it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from glasshouse.base.errors import UsageError
from glasshouse.model.float8 import Float8Linear, has_float8, rounded, use_float8
from glasshouse.model.gpt import GPT
from glasshouse.model.taps import Taps
from model.shapes import noisy

TOKENS = torch.arange(64).view(4, 16) % 29


def model(**features: object) -> GPT:
    return noisy(vocab_size=29, context=16, d_model=32, n_layer=2, n_head=2, **features)


def close(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm()) < share


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rounding_keeps_every_entry_to_the_format_s_precision(dtype: torch.dtype, size: float) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size
    x8, scale = rounded(x, dtype)
    assert bool(torch.isfinite(x8.float()).all())
    if size >= 1:
        error = (x8.float() * scale - x).abs()
        assert bool(
            (error <= torch.finfo(dtype).eps * x.abs() + scale * torch.finfo(dtype).smallest_normal).all()
        )


def test_a_linear_layer_and_its_gradients_are_those_of_full_precision_to_fp8s_error() -> None:
    plain = torch.nn.Linear(48, 64)
    fast = Float8Linear(48, 64)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2))
    y, expected = fast(x), plain(x)
    assert close(y, expected, 0.05) and not torch.equal(y.float(), expected)
    got = torch.autograd.grad(y, [x, *fast.parameters()], g.to(y.dtype))
    wanted = torch.autograd.grad(expected, [x, *plain.parameters()], g)
    for a, b, share in zip(got, wanted, (0.1, 0.1, 0.01), strict=True):
        assert a.dtype == b.dtype and close(a, b, share)


def test_a_model_keeps_its_names_weights_and_evaluation() -> None:
    exact = model()
    fast = copy.deepcopy(exact)
    assert use_float8(fast) == 2 * 6
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in exact.named_parameters()]
    with torch.no_grad():
        assert torch.equal(fast(TOKENS), exact(TOKENS))
    with Taps(read=["blocks.*.resid_post"]) as taps:
        assert close(fast(TOKENS, taps), exact(TOKENS), 0.2)
    assert len(taps.acts) == 2


def test_training_in_fp8_learns_what_full_precision_learns() -> None:
    tokens = torch.arange(68).view(4, 17) % 29  # 4 x 16 rows of inputs: a multiple of 16, or FP8 stands aside

    def final(fp8: bool) -> float:
        m = model()
        if fp8:
            use_float8(m)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(30):
            loss = F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    exact, fast = final(False), final(True)
    assert exact != fast and abs(exact - fast) < 0.1 and fast < 1.0


def test_a_width_that_tiles_do_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"0.mlp.up is 32 x 40.*bf16"):
        use_float8(model(d_mlp=40))


def test_a_cpu_does_not_claim_to_have_it() -> None:
    assert not has_float8(torch.device("cpu"))
