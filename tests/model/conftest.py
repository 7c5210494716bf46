"""Tiny random models, in the shapes that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glasshouse.model import GPT, GPTConfig

SHAPES: dict[str, dict[str, Any]] = {
    "ours": {"qk_norm": True},
    "grouped": {"n_kv_head": 2, "mlp": "gated", "activation": "silu", "tied": False},
    "gpt2": {
        **{"norm": "layer", "position": "learned", "mlp": "plain", "activation": "gelu_tanh"},
        **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
    },
    "one-kv-head": {"n_kv_head": 1, "d_head": 6, "attn_bias": True, "activation": "relu"},
}


def make(shape: str = "ours", seed: int = 0, **changes: Any) -> GPT:
    """A model whose every parameter is random, also those that initialisation leaves at zero."""
    base = {"vocab_size": 53, "context": 32, "d_model": 16, "n_layer": 3, "n_head": 4}
    model = GPT(GPTConfig(**{**base, **SHAPES[shape], **changes})).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.25)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., GPT]:
    return make


@pytest.fixture(params=sorted(SHAPES))
def any_model(request: pytest.FixtureRequest) -> GPT:
    return make(request.param)
