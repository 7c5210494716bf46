"""Models of every family in the test shapes: which features each needs."""

from __future__ import annotations

from typing import Any

import torch

from glasshouse.model import GPT, GPTConfig
from glasshouse.model.config import RopeScaling

SANDWICH: dict[str, Any] = {
    **{"norm_place": "both", "norm_offset": True, "embed_scale": 4.0, "activation": "gelu_tanh"},
    **{"window_tokens": 4, "full_layers": (1,), "attn_scale": 100**-0.5},
}
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("grouped", {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=8)}),
    "qwen2": ("grouped", {"attn_bias": True, "window_tokens": 4, "full_layers": (0,)}),
    "qwen3": ("grouped", {"qk_norm": True, "tied": True}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": (
        "gpt2",
        {"position": "rotary", "rope_fraction": 0.5, "parallel": True, "tied": False},
    ),
    "mistral": ("grouped", {"window_tokens": 4}),
    "gemma2": ("grouped", {**SANDWICH, "attn_softcap": 5.0, "logit_softcap": 3.0}),
    "gemma3_text": (
        "grouped",
        {
            **{**SANDWICH, "qk_norm": True, "rope_theta_window": 50.0},
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        },
    ),
    "olmo2": ("grouped", {"norm_place": "post", "qk_norm": True, "qk_norm_span": "all"}),
}


def noisy(seed: int = 0, **config: Any) -> GPT:
    """A model whose every parameter is drawn with deviation 0.2: enough to tell ways to compute it apart."""
    model = GPT(GPTConfig(**config))
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model
