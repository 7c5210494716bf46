"""FP8 matrix products for training on GPUs that have them; the weights themselves stay as they are.

Activations and weights are rounded to e4m3 and gradients to e5m2, each tensor scaled so that its largest
entry just fits (dynamic per-tensor scaling; Micikevicius et al. 2022, arXiv 2209.05433). Products accumulate
in higher precision and come out in bf16. Only the blocks' large matrices take part: embedding, head, norms
and attention scores keep their precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.model.gpt import GPT

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # rows and columns that the hardware's tiles need


def has_float8(device: torch.device) -> bool:
    """Whether ``device`` multiplies FP8 matrices fast: NVIDIA's Ada, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def use_float8(model: GPT) -> int:
    """Let the matrices of ``model``'s blocks multiply in FP8; return how many. Names and weights stay.

    Raises UsageError when a matrix has a side that is no multiple of 16.
    """
    changed = 0
    for name, module in list(model.blocks.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise UsageError(
                f"FP8 needs widths that are multiples of {MULTIPLE}; blocks.{name} is {module.in_features} x "
                f"{module.out_features}. Choose another width, or precision = 'bf16'"
            )
        parent, _, child = name.rpartition(".")
        with torch.device("meta"):
            fast = Float8Linear(module.in_features, module.out_features, bias=module.bias is not None)
        fast.weight, fast.bias = module.weight, module.bias
        setattr(model.blocks.get_submodule(parent), child, fast)
        changed += 1
    return changed


def uses_float8(model: GPT) -> bool:
    """Whether `use_float8` was applied."""
    return any(isinstance(module, Float8Linear) for module in model.blocks.modules())


class Float8Linear(nn.Linear):
    """``nn.Linear`` whose three products (output, gradient of input, of weight) are FP8 in training."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not torch.is_grad_enabled() or rows % MULTIPLE:
            return super().forward(x)
        y = _product(x.reshape(rows, -1), self.weight)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x [m, in] @ weight [out, in]^T -> [m, out] in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = rounded(x, FORWARD)
        w8, w_scale = rounded(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = (x.dtype, weight.dtype)
        return _multiply(x8, x_scale, w8.t(), w_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = rounded(grads[0], BACKWARD)
        d_x = _multiply(g8, g_scale, _by_columns(w8), w_scale)
        d_weight = _multiply(g8.t().contiguous(), g_scale, _by_columns(x8), x_scale)
        return d_x.to(ctx.dtypes[0]), d_weight.to(ctx.dtypes[1])


_product: Callable[[Tensor, Tensor], Tensor] = _Product.apply


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` in FP8, and the fp32 scale by which it must be multiplied to be ``x`` again."""
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.detach().float() / scale).to(dtype), scale


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, as the second factor has to be."""
    return x.t().contiguous().t()


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)
