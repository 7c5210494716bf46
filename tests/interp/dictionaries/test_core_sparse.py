"""Choosing the largest, and sums that visit only what is active."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from glasshouse.interp.dictionaries import sparse
from glasshouse.interp.dictionaries.sparse import Active, batch_top_k, decode_active, encode_active, top_k

few = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0])


@hypothesis.given(
    rows=st.integers(1, 6),
    k=st.integers(1, 4),
    groups=st.integers(1, 12),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_top_k_equals_torch_with_ties(rows: int, k: int, groups: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = groups * sparse.GROUPS_PER_K * k
    pre = torch.randn(rows, width, generator=generator)
    pre = (pre * 2).round() if ties else pre
    values, indices = top_k(pre, k)
    assert torch.equal(values.sort(1).values, pre.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_of_more_axes_of_bf16_and_of_narrow_rows() -> None:
    for shape, k in [((3, 5, 512), 2), ((7, 9), 3), ((4, 100), 100), ((2, 4096), 32)]:
        pre = torch.randn(shape).bfloat16()
        values, indices = top_k(pre, k)
        assert torch.equal(values.sort(-1).values, pre.topk(k, dim=-1).values.sort(-1).values)
        assert torch.equal(pre.gather(-1, indices), values)


def test_top_k_does_not_hide_a_nan() -> None:
    pre = torch.randn(2, 256)
    pre[1, 200] = math.nan
    assert top_k(pre, 2)[0].isnan().any(1).tolist() == [False, True]


@hypothesis.given(
    n=st.integers(1, 40),
    k=st.integers(1, 5),
    scale=st.floats(0, 3),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_batch_top_k_equals_torch_over_the_flat_batch(
    n: int, k: int, scale: float, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different sizes: the rows that the bound is guessed from say little about the others.
    pre = torch.randn(n, 12, generator=generator) * torch.exp(scale * torch.randn(n, 1, generator=generator))
    pre = pre.round() if ties else pre
    rows, features = batch_top_k(pre, n * k)
    expected = pre.flatten().topk(n * k).values.sort().values
    assert torch.equal(pre[rows, features].sort().values, expected)
    assert torch.equal(rows, rows.sort().values)
    assert len(set(zip(rows.tolist(), features.tolist(), strict=True))) == n * k


@hypothesis.given(seed=st.integers(0, 2**16), share=st.floats(0, 1), integer=st.booleans())
def test_sparse_products_and_gradients_equal_dense_ones(seed: int, share: float, integer: bool) -> None:
    """Also where rows or features are empty."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, w_enc, b_enc, w_dec = drawn(7, 5), drawn(5, 9), drawn(9), drawn(9, 6)
    mask = torch.rand(7, 9, generator=generator) < share
    rows, features = mask.nonzero().unbind(1)
    active = Active.of(features, rows, 7, 9)
    towards = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    values = encode_active(x, w_enc, b_enc, active)
    fast = decode_active(values, w_dec, active)
    plain = ((x @ w_enc + b_enc) * mask) @ w_dec
    torch.testing.assert_close(fast, plain)
    inputs = (x, w_enc, b_enc, w_dec)
    for one, other in zip(
        torch.autograd.grad(fast, inputs, towards),
        torch.autograd.grad(plain, inputs, towards),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_parts_of_a_code_add_up_to_it() -> None:
    torch.manual_seed(0)
    active = Active.of_top_k(torch.rand(20, 16).topk(4).indices, 16)
    values, rows = torch.randn(80), torch.randn(16, 3)
    whole = decode_active(values, rows, active)
    parts = []
    for low, high in [(0, 5), (5, 6), (6, 16)]:
        inside, part = active.between(low, high)
        parts.append(decode_active(values[inside], rows, part))
    torch.testing.assert_close(sum(parts[1:], parts[0]), whole)


@pytest.mark.parametrize("n_features", [40, 2**15 + 3])
def test_features_are_sorted_whatever_their_number(n_features: int) -> None:
    indices = torch.randint(n_features, (30, 2))
    active = Active.of_top_k(indices, n_features)
    by_feature = active.features[active.order]
    assert torch.equal(by_feature, by_feature.sort().values)
    starts = active.feature_starts
    assert all(int(starts[j]) == int((active.features < j).sum()) for j in by_feature.unique().tolist())
