"""Attention paths: one result, several ways to compute it, each a named function equal to the plain one.

`pattern_attention` is the definition; the others exist for speed. `attend` chooses between them by device
and shape, never by a family's name. All take q [B, H, T, K] and k, v [B, H, S, K] and return z [B, H, T, K].

Shape legend: B batch, T position (new tokens), S positions attended to, H heads, K d_head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of queries that one block of `blocked_attention` holds: with 128 the products stay large enough for
# the matrix units, and of a context of 256 a quarter of the pattern is never computed.
BLOCK_ROWS = 128


@dataclass(frozen=True)
class Rule:
    """How scores are made, the same for every position: a feature of the config.

    ``scale``: factor of the scores. ``softcap``: c in c tanh(x / c) (Gemma-2, arXiv 2408.00118, sec. 2).
    ``causal``: no position sees a later one. Who sees whom beyond that is the mask's business.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool [T, S], True = attend: the last T of S positions see themselves and earlier ones.

    With ``window`` only the last ``window`` positions, themselves included (Mistral, arXiv 2310.06825).
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask if window is None else mask.triu(S - T - window + 1)


def attention_pattern(q: Tensor, k: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Explicit softmax attention [B, H, T, S]: what fused kernels never form. ``mask``: True = attend."""
    scores = (q * rule.scale) @ k.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores.float() / rule.softcap)
    if mask is None and rule.causal:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(q.dtype)  # summed in fp32 inside, whatever the precision outside


def pattern_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """The definition: form the whole pattern, then mix the values by it."""
    return attention_pattern(q, k, mask, rule) @ v


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, rows: int = BLOCK_ROWS
) -> Tensor:
    """`pattern_attention` in blocks of query rows; a causal block skips the keys after its last row.

    On CPUs matrix products run near the machine's peak and the fused kernel at a quarter of it, so in
    training this is the fast path, and the pattern it keeps for the backward pass is smaller.
    """
    T, S = q.shape[-2], k.shape[-2]
    if rows >= T:
        return pattern_attention(q, k, v, mask, rule)
    blocks = []
    for start in range(0, T, rows):
        end = min(start + rows, T)
        seen = S - T + end if rule.causal else S
        part = mask[..., start:end, :seen] if mask is not None else None
        blocks.append(pattern_attention(q[..., start:end, :], k[..., :seen, :], v[..., :seen, :], part, rule))
    return torch.cat(blocks, dim=-2)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """torch's own kernels: flash attention on a GPU, never a whole pattern in memory. No softcap."""
    if rule.softcap is not None:
        raise ValueError("the fused kernels have no softcap; use pattern_attention")
    alone = mask is None and q.shape[-2] == k.shape[-2]
    if mask is None and rule.causal and not alone and q.shape[-2] > 1:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    if alone and rule.causal and q.shape[-2] > 1:  # a branch: compiled for any length, the value is a symbol
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Mix values by attention, on the path that is fastest for this device and shape."""
    if rule.softcap is not None or explicit_is_faster(q, k):
        return blocked_attention(q, k, v, mask, rule)
    return fused_attention(q, k, v, mask, rule)


def explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether plain matrix products beat the fused kernel: on CPUs, whose fused backward pass runs at a
    fraction of their speed, when gradients are wanted and the patterns of one layer fit in memory.
    """
    return q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and k.shape[-2] <= 1024
