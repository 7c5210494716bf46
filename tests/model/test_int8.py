"""Weights in 8 bits: bounded error, and a twin that says what they cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.decode import Decoder
from glasshouse.model.generate import generate
from glasshouse.model.int8 import dequantize, int8_linear, int8_twin, quantize


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.integers(1, 40))
def test_no_weight_moves_by_more_than_half_a_step(seed, size, width):
    w = torch.randn(7, width, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantize(w)
    assert scale.dtype == torch.bfloat16 and q.abs().max() <= 127
    step = scale.float()[:, None]
    assert ((dequantize(q, scale) - w).abs() <= step / 2 * (1 + 1e-5)).all()
    # Rounding the scale up to bf16 costs at most 1 part in 128 of a step.
    assert (scale.float() <= w.abs().amax(dim=1) / 127 * (1 + 2**-6)).all()


def test_rows_of_zeros_stay_zero_and_damage_is_refused():
    q, scale = quantize(torch.zeros(3, 5))
    assert not dequantize(q, scale).any()
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("width", [6, 16, 24, 32, 100, 128])
def test_the_kernel_equals_the_unpacked_product(width):
    g = torch.Generator().manual_seed(width)
    w, x = torch.randn(37, width, generator=g), torch.randn(5, width, generator=g).bfloat16()
    q, scale = quantize(w)
    exact = x.float() @ dequantize(q, scale).T
    assert (int8_linear(x, q, scale).float() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("shape", ["ours", "grouped", "gpt2", "one-kv-head"])
@torch.no_grad()
def test_int8_decoding_computes_what_its_twin_computes(tiny, shape):
    model = tiny(shape)
    twin = int8_twin(model)
    prompt = [5, 4, 3, 2, 1, 0, 7]
    decoder = Decoder(model, weights="int8")
    got = decoder.logits(decoder.prefill([prompt], decoder.cache(1, 8)))[0]
    expected = twin(torch.tensor([prompt]))[0, -1]
    exact = model(torch.tensor([prompt]))[0, -1]
    bf16 = Decoder(model, dtype=torch.bfloat16)
    rounding = (bf16.logits(bf16.prefill([prompt], bf16.cache(1, 8)))[0] - exact).square().mean().sqrt()
    assert (got - expected).square().mean().sqrt() <= 2 * rounding + 1e-3
    assert not torch.equal(expected, exact), "8 bits are not free"
    assert torch.equal(model(torch.tensor([prompt]))[0, -1], exact), "the model itself is untouched"


def test_int8_samples_do_not_depend_on_batch_mates(tiny):
    decoder = Decoder(tiny("grouped"), weights="int8")
    prompts, seeds = [[1, 2, 3], [4], [9, 9], [5, 6, 7, 8]], [1, 2, 3, 4]
    together = generate(decoder, prompts, 8, temperature=1.0, seeds=seeds, return_logprobs=True)
    for prompt, seed, made in zip(prompts, seeds, together, strict=True):
        alone = generate(decoder, [prompt], 8, temperature=1.0, seeds=[seed], return_logprobs=True)
        assert alone == [made]


def test_only_layouts_that_exist_are_taken(tiny):
    with pytest.raises(UsageError, match="'model' or 'int8'"):
        Decoder(tiny(), weights="int4")
