"""How fast training could be: operations per token, and what this machine's matrix products reach."""

from __future__ import annotations

import time

import torch

from glasshouse.model import GPT


def flops_per_token(model: GPT, pos: int) -> float:
    """Floating-point operations of forward and backward per token at sequence length ``pos``.

    6 N + 12 L H K T (PaLM, Chowdhery et al. 2022, appendix B). N counts the parameters of matrix products
    only: an embedding is looked up, and counts just where it is also the (tied) head. Attention is counted
    in full, though causal attention needs half of it, as is usual; so the share of peak is comparable with
    others'.
    """
    config = model.config
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.startswith(("embed", "pos"))
    )
    if config.tied:
        matrices += model.embed.weight.numel()
    return 6.0 * matrices + 12.0 * config.n_layer * config.n_head * config.head_width * pos


def gemm_peak(dtype: str = "fp32", size: int = 1024, seconds: float = 1.0) -> float:
    """Best rate, in operations per second, of square matrix products [size, size] with torch's current
    threads.

    The best of all products within ``seconds``: a peak is what the machine can do when nothing disturbs it.
    """
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = torch.ones(size, size, dtype=kind), torch.ones(size, size, dtype=kind)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
