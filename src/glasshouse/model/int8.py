"""Weights in 8 bits: one scale an output channel, symmetric, rounded to nearest. Activations stay floats.

The scheme of LLM.int8()'s vector-wise weights (Dettmers et al. 2022, arXiv 2208.07339, sec. 2.1) without its
outlier split: activations are not quantised, so they need none.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError
from glasshouse.model.gpt import GPT

VECTOR = 32  # inputs; the CPU kernel works on rows of whole vectors


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], bf16 scale [out]) such that ``int8 * scale`` is within scale / 2 of every weight.

    The scale is rounded up to bf16 *before* the weights are divided by it, so that kernels which want bf16
    scales lose nothing by it. A row of zeros gets scale 1. CheckpointError for weights that are not finite.
    """
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError("weights that are not finite cannot be quantised; load an earlier checkpoint")
    exact = w.abs().amax(dim=1) / 127
    scale = exact.bfloat16()
    # bf16 keeps 8 bits, so 1 + 2^-7 is one step up at least; a row too small for bf16 is as good as zero.
    scale = torch.where(scale.float() < exact, (scale.float() * (1 + 2**-7)).bfloat16(), scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [out, in] that ``q`` and ``scale`` stand for."""
    return (q.float() * scale.float()[:, None]).to(dtype)


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """``x @ W.T`` [rows, out] for quantised W, in x's dtype; on CPUs a kernel that never unpacks W."""
    # The kernel reads whole vectors without looking at the end: other widths crash the process.
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] % VECTOR == 0:
        return torch.ops.aten._weight_int8pack_mm(x, q, scale)
    return F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)


def int8_twin(model: GPT) -> GPT:
    """A copy whose matrices hold exactly the values that int8 decoding computes with, in the same dtype.

    For measuring what quantisation costs, by any evaluation and with taps. Embeddings read by token id stay
    as they were, so a tied head comes apart: the twin's config says so.
    """
    config = model.config.model_copy(update={"tied": False})
    twin = GPT(config).to(model.embed.weight)
    state = copy.copy(model.state_dict())
    state.setdefault("head.weight", model.embed.weight)
    twin.load_state_dict(state)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(dequantize(*quantize(module.weight), module.weight.dtype))
    return twin.eval()
