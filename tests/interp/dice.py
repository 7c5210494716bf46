"""A small GPT with every weight random (initialisation leaves half of them zero), and a read-out on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glasshouse.model import GPT, GPTConfig


class Difference:
    """Logit of token 3 less logit of token 5."""

    def margin(self, logits: Tensor) -> Tensor:
        return logits[..., 3] - logits[..., 5]


def thrown(seed: int = 0, scale: float = 0.3, **shape: Any) -> GPT:
    """A random model; ``scale`` is the standard deviation of every matrix entry."""
    config = {"vocab_size": 24, "context": 16, "d_model": 16, "n_layer": 3, "n_head": 4, "mlp": "gated",
              "activation": "silu"} | shape  # fmt: skip
    model = GPT(GPTConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
            else:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return model
