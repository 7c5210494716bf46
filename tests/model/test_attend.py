from __future__ import annotations

import itertools

import pytest
import torch

from glasshouse.model.attend import (
    Rule,
    attend,
    blocked_attention,
    causal_mask,
    explicit_is_faster,
    fused_attention,
    pattern_attention,
)
from glasshouse.model.taps import Taps
from model.shapes import noisy

PATHS = {"blocked": lambda *a: blocked_attention(*a, rows=4), "fused": fused_attention, "chosen": attend}


def qkv(T: int = 11, S: int = 11, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, 8, generator=g).to(dtype).requires_grad_() for n in (T, S, S))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mask", ["none", "window", "ragged"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [11, 3])
def test_every_path_computes_the_plain_one_and_its_gradient(
    path: str, mask: str, causal: bool, T: int
) -> None:
    q, k, v = qkv(T)
    seen = {
        "none": None,
        "window": causal_mask(T, 11, q.device, window=4),
        "ragged": causal_mask(T, 11, q.device)
        & (torch.arange(11) >= torch.tensor([0, 2])[:, None])[:, None, None]
        | torch.eye(11, dtype=torch.bool)[-T:],
    }[mask]
    rule = Rule(0.3, causal=causal or mask != "none")
    expected = pattern_attention(q, k, v, seen, rule)
    got = PATHS[path](q, k, v, seen, rule)
    assert torch.allclose(got, expected, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), [q, k, v]),
        torch.autograd.grad(expected.square().sum(), [q, k, v]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_scores_are_capped_scaled_and_masked_as_defined() -> None:
    q, k, v = qkv()
    scores = 5 * torch.tanh(0.7 * torch.einsum("bhtk,bhsk->bhts", q, k) / 5)
    scores = torch.where(torch.ones(11, 11).tril() > 0, scores, -torch.inf)
    expected = scores.softmax(-1) @ v
    rule = Rule(0.7, softcap=5.0)
    for rows in (3, 4, 100):
        assert torch.allclose(blocked_attention(q, k, v, None, rule, rows=rows), expected, atol=1e-5)
    assert torch.allclose(attend(q, k, v, None, rule), expected, atol=1e-5)
    with pytest.raises(ValueError, match="softcap"):
        fused_attention(q, k, v, None, rule)


def test_a_window_ends_with_the_position_itself() -> None:
    for T, S, window in itertools.product((1, 3, 5), (5, 8), (1, 2, 5)):
        mask = causal_mask(T, S, torch.device("cpu"), window)
        for t, s in itertools.product(range(T), range(S)):
            at = S - T + t
            assert bool(mask[t, s]) == (at - window < s <= at)


def test_in_bf16_the_paths_agree_as_closely_as_bf16_can() -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    rule = Rule(0.35)
    exact = pattern_attention(q.float(), k.float(), v.float(), None, rule)
    for path in PATHS.values():
        assert torch.allclose(path(q, k, v, None, rule).float(), exact, atol=3e-2)


@pytest.mark.parametrize("features", [{}, {"window_tokens": 3}, {"attn_softcap": 10.0}, {"causal": False}])
def test_taps_read_the_same_on_the_training_path_and_on_the_evaluation_path(
    features: dict[str, object],
) -> None:
    model = noisy(1, vocab_size=17, context=160, d_model=16, n_layer=2, n_head=2, **features)
    tokens = torch.arange(300).view(2, 150) % 17  # longer than a block of the blocked path
    sites = [s for s in model.sites() if not s.endswith("pattern")]
    assert explicit_is_faster(*(torch.zeros(1, 1, 150, 8, requires_grad=True),) * 2)
    with Taps(read=sites) as training:
        model(tokens, training)
    with torch.no_grad(), Taps(read=sites) as evaluating:
        model(tokens, evaluating)
    with torch.no_grad(), Taps(read=model.sites()) as explicit:  # asks for patterns: the plain path
        model(tokens, explicit)
    for site in sites:
        assert torch.allclose(training[site], evaluating[site], atol=2e-5), site
        assert torch.allclose(training[site], explicit[site], atol=2e-5), site
