"""Cross-entropy straight from the residual stream: the logits of a batch are never all in memory.

A vocabulary of 50k words makes 200 MB of fp32 logits from 1,024 targets, and a backward pass keeps them
twice more. Here the gradient is made in the same visit as the loss, a few rows at a time, so that softmax
works in cache and what stays is one gradient in the precision of the matrix products.

Shape legend: M targets, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# fp32 logits formed at once: few enough to stay in a CPU's last cache level, enough for fast products.
LOGITS_AT_ONCE = 2**23
# Gradients of logits held at once, in the products' precision: 4,096 targets of a vocabulary of 50k.
GRADIENTS_AT_ONCE = 2**28


def plain_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, weight_M: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: weighted sums over the targets of the cross-entropy in nats and of log(Z)^2."""
    logits_MV = F.linear(hidden_MD, head_VD).float()
    if softcap is not None:
        logits_MV = softcap * torch.tanh(logits_MV / softcap)
    nats_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
    return (nats_M * weight_M).sum(), (logits_MV.logsumexp(-1).square() * weight_M).sum()


def linear_cross_entropy(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    weight_M: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_cross_entropy` in pieces: (nats + z_loss * log(Z)^2, nats, log(Z)^2), three weighted sums.

    Only the first carries a gradient, to ``hidden_MD`` and ``head_VD``. ``weight_M`` float32 [M] and
    ``targets_M`` int64 [M] have none. Matrix products run in autocast's precision, softmax in fp32.
    ``softcap`` as in Gemma-2; log(Z)^2 keeps logits from drifting (PaLM, arXiv 2204.02311, sec. 5).
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    with torch.autocast(device, enabled=False):
        total, nats, square = _in_pieces(hidden_MD, head_VD, targets_M, weight_M, softcap, z_loss, dtype)
    return total, nats.detach(), square.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weight: Tensor,
        softcap: float | None,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.to(dtype), head.to(dtype)
        learning = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if learning else None
        d_head: Tensor | None = None
        rows = max(1, GRADIENTS_AT_ONCE // head.shape[0])
        for some in _slices(hidden.shape[0], rows):
            found, gradient = _visit(h[some], w, targets[some], weight[some], softcap, z_loss, learning)
            sums += found
            if gradient is not None and d_hidden is not None:
                d_hidden[some] = gradient @ w
                d_w = (gradient.mT @ h[some]).to(head.dtype)
                d_head = d_w if d_head is None else d_head.add_(d_w)
        ctx.save_for_backward(d_hidden, d_head)
        nats, square = sums.unbind()
        total = nats + z_loss * square
        ctx.mark_non_differentiable(nats, square)
        return total, nats, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scale = grads[0]
        return d_hidden * scale.to(d_hidden.dtype), d_head * scale, None, None, None, None, None


_in_pieces: Callable[..., tuple[Tensor, Tensor, Tensor]] = _LinearCrossEntropy.apply


def _visit(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    weight: Tensor,
    softcap: float | None,
    z_loss: float,
    learning: bool,
) -> tuple[Tensor, Tensor | None]:
    """[nats, log(Z)^2] of some rows, and the gradient [m, V] of their weighted sum by the raw logits."""
    gradient = torch.empty(h.shape[0], w.shape[0], dtype=h.dtype, device=h.device) if learning else None
    sums = torch.zeros(2, dtype=torch.float32, device=h.device)
    for some in _slices(h.shape[0], max(1, LOGITS_AT_ONCE // w.shape[0])):
        logits = F.linear(h[some], w).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        target, by = targets[some, None], weight[some, None]
        log_p = logits.log_softmax(-1)
        log_z = logits[:, :1] - log_p[:, :1]
        nats = -log_p.gather(-1, target)
        sums += torch.stack([(nats * by).sum(), (log_z.square() * by).sum()])
        if gradient is None:
            continue
        # d nats = p - onehot(target); d log(Z)^2 = 2 log(Z) p; d softcap = 1 - (capped / c)^2
        d = log_p.exp_().mul_(by * (1 + 2 * z_loss * log_z))
        d.scatter_add_(-1, target, -by)
        if softcap is not None:
            d.mul_(1 - (logits / softcap).square_())
        gradient[some] = d.to(gradient.dtype)
    return sums, gradient


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
