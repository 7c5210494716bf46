"""Models in which every part does something: initialisation leaves what writes to the stream at zero."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def stirred(model: M, seed: int, scale: float = 0.2) -> M:
    """``model`` itself, with Gaussian noise of standard deviation ``scale`` on every parameter."""
    drawn = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(scale * torch.randn(p.shape, generator=drawn))
    return model
