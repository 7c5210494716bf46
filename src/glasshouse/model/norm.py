"""Normalisation of the last dimension."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse.model.config import GPTConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019) whose weight follows the input's precision, so that it stays fused.

    With ``offset`` the gain is 1 + weight, and rounding waits until after it (Gemma).
    """

    def __init__(self, width: int, eps: float, offset: bool = False):
        super().__init__(width, eps=eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:
            return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016) or nothing, over the last dimension."""
    match config.norm:
        case "rms":
            return RMSNorm(width, config.norm_eps, config.norm_offset)
        case "layer":
            return nn.LayerNorm(width, eps=config.norm_eps)
    return nn.Identity()
