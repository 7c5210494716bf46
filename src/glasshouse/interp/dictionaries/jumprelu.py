"""JumpReLU and the step function, with straight-through gradients for the threshold.

Rajamanoharan et al. 2024b (arXiv 2407.14435), eq. 11 and 12, with a rectangular kernel: near the threshold,
within half a bandwidth, a change of the threshold counts as if the jump were spread over the bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``pre`` [n, S] where it exceeds ``threshold`` [S] and zero, else 0."""
    made: Tensor = _JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where ``pre`` [n, S] exceeds ``threshold`` [S] and zero, else 0; its gradient is the threshold's."""
    made: Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


def _open(pre: Tensor, threshold: Tensor) -> Tensor:
    return ((pre > threshold) & (pre > 0)).to(pre.dtype)


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * _open(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        by_threshold = -(threshold / ctx.bandwidth) * _near(pre, threshold, ctx.bandwidth) * grads[0]
        return grads[0] * _open(pre, threshold), by_threshold.sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return _open(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        by_threshold = -_near(pre, threshold, ctx.bandwidth) / ctx.bandwidth * grads[0]
        return None, by_threshold.sum(0), None
