"""A GPT in one readable file: config, norms, rotary, attention, MLP, block, model.

The choices, each a feature of the config and never a branch on a family's name:
decoder-only transformer (Vaswani et al. 2017; Radford et al. 2019), pre-norm residual stream,
rotary (Su et al. 2021) or learned positions, grouped key/value heads (Ainslie et al. 2023),
RMSNorm or LayerNorm, gated (Shazeer 2020) or plain MLP, optional QK-norm (Henry et al. 2020),
tied or untied head. Matrices act as ``x @ W.T`` like ``nn.Linear``.

Shape legend: B batch, T position (new tokens), S positions attended to (cached + new), D d_model,
H query heads, G key/value heads, K d_head, F d_mlp, V vocabulary.

Activations are read and edited through the explicit argument ``taps``. It is an argument and not a
forward hook because hooks added after the first compiled call are silently not run; a check that
reads nothing and says nothing is the worst bug this file could have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from glasshouse.base.config import Frozen
from glasshouse.model.taps import Taps, tap

if TYPE_CHECKING:
    from glasshouse.model.cache import KVCache

BLOCK_SITES = (
    *("resid_pre", "q", "k", "v", "pattern", "z", "attn_out"),
    *("resid_mid", "mlp_pre", "mlp_post", "mlp_out", "resid_post"),
)


class GPTConfig(Frozen):
    """The shape of a model. ``None`` means "derived", and is resolved by the properties below."""

    vocab_size: int = Field(ge=2)
    context: int = Field(ge=1, description="longest sequence, in tokens")
    d_model: int = Field(ge=1)
    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_kv_head: int | None = Field(default=None, ge=1, description="key/value heads; None: one per query head")
    d_head: int | None = Field(default=None, ge=1, description="None: d_model / n_head")
    d_mlp: int | None = Field(default=None, ge=1, description="None: 4 d_model plain, 8/3 d_model gated")
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(default=1e-5, gt=0)
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = Field(default=10_000.0, gt=0)
    mlp: Literal["plain", "gated"] = "plain"
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"] = "relu2"
    attn_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> GPTConfig:
        if self.d_head is None and self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}")
        return self

    @property
    def head_width(self) -> int:
        """Width of one head (K)."""
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (G)."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP (F)."""
        return self.d_mlp or (4 * self.d_model if self.mlp == "plain" else 8 * self.d_model // 3)


def activate(kind: str, x: Tensor) -> Tensor:
    """The MLP's non-linearity, elementwise."""
    match kind:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()  # So et al. 2021 (Primer)
    raise ValueError(f"unknown activation {kind!r}")


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019) whose weight follows the input's precision, so that it stays fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension."""
    if config.norm == "rms":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)


def rotary_tables(config: GPTConfig, n: int) -> tuple[Tensor, Tensor]:
    """cos, sin of every (position, frequency), each [n, d_head / 2], in fp32."""
    half = config.head_width // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + K/2]), the half-split layout Hugging Face uses. cos, sin: [.., T, K/2]."""
    a, b = x_BHTK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)


class Attention(nn.Module):
    """Multi-head causal attention with grouped key/value heads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, H, G, K = config.d_model, config.n_head, config.kv_heads, config.head_width
        self.q = nn.Linear(D, H * K, bias=config.attn_bias)
        self.k = nn.Linear(D, G * K, bias=config.attn_bias)
        self.v = nn.Linear(D, G * K, bias=config.attn_bias)
        self.o = nn.Linear(H * K, D, bias=config.attn_out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(K, eps=config.norm_eps), RMSNorm(K, eps=config.norm_eps)

    def forward(
        self, x_BTD: Tensor, where: Where, taps: Taps | None = None, cache: KVCache | None = None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        K, i = self.config.head_width, self.layer
        q = self.q(x_BTD).view(B, T, -1, K).transpose(1, 2)  # [B, H, T, K]
        k = self.k(x_BTD).view(B, T, -1, K).transpose(1, 2)  # [B, G, T, K]
        v = self.v(x_BTD).view(B, T, -1, K).transpose(1, 2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if where.cos is not None and where.sin is not None:
            q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q, k, v = tap(taps, i, "q", q), tap(taps, i, "k", k), tap(taps, i, "v", v)
        if cache is not None:
            k, v = cache.extend(i, k, v)  # [B, G, S, K]
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if taps is not None and taps.wants(f"blocks.{i}.pattern"):
            z = (
                tap(taps, i, "pattern", attention_pattern(q, k, where.mask)) @ v
            )  # [B, H, T, S] @ [B, H, S, K]
        elif explicit_is_faster(q, k):
            z = attention_pattern(q, k, where.mask) @ v
        elif where.mask is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=where.mask)
        z = tap(taps, i, "z", z)  # [B, H, T, K]
        return self.o(z.transpose(1, 2).reshape(B, T, -1))


def explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether plain matrix products beat the fused kernel: on CPUs its backward pass runs at a fraction of
    their speed, so in training, for contexts short enough that the pattern fits in cache.
    """
    return q.device.type == "cpu" and q.requires_grad and k.shape[-2] <= 256


def attention_pattern(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Explicit softmax attention [B, H, T, S]: what fused kernels never form. ``mask``: True = attend."""
    T, S = q.shape[-2], k.shape[-2]
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(q.dtype)


class MLP(nn.Module):
    """Position-wise MLP: ``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, W = config.d_model, config.mlp_width
        if config.mlp == "gated":
            self.gate = nn.Linear(D, W, bias=config.mlp_bias)
        self.up = nn.Linear(D, W, bias=config.mlp_bias)
        self.down = nn.Linear(W, D, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor, taps: Taps | None = None) -> Tensor:
        gated = self.config.mlp == "gated"
        pre = tap(taps, self.layer, "mlp_pre", self.gate(x_BTD) if gated else self.up(x_BTD))
        post = activate(self.config.activation, pre)
        if gated:
            post = post * self.up(x_BTD)
        return self.down(tap(taps, self.layer, "mlp_post", post))  # mlp_post: [B, T, F]


class Block(nn.Module):
    """One layer: the residual stream plus attention, plus MLP."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm1, self.attn = make_norm(config, config.d_model), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config, config.d_model), MLP(config, layer)

    def forward(
        self, x: Tensor, where: Where, taps: Taps | None = None, cache: KVCache | None = None
    ) -> Tensor:
        i = self.layer
        x = tap(taps, i, "resid_pre", x)
        attended = self.attn(self.norm1(x), where, taps, cache)
        x = tap(taps, i, "resid_mid", x + tap(taps, i, "attn_out", attended))
        x = tap(taps, i, "resid_post", x + tap(taps, i, "mlp_out", self.mlp(self.norm2(x), taps)))
        return x


class Where:
    """Where the new tokens stand: rotary tables for their positions and who may attend to whom."""

    __slots__ = ("cos", "mask", "sin")

    def __init__(self, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None):
        self.cos, self.sin, self.mask = cos, sin, mask


class GPT(nn.Module):
    """A decoder-only language model. ``model(tokens)`` gives logits [batch, pos, vocab]."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.pos = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = make_norm(config, config.d_model)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.position == "rotary":
            cos, sin = rotary_tables(config, config.context)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self, seed: int) -> GPT:
        """Initialise every parameter from ``seed``: the same bits for the same torch and CPU capability.

        | parameter                     | distribution                                          |
        |-------------------------------|-------------------------------------------------------|
        | embeddings, head              | normal, std 0.02 (GPT-2)                              |
        | q, k, v, gate, up             | normal, std d_model ** -0.5                           |
        | o, down (write to the stream) | zero: each block starts as the identity (muP, Yang et al. 2022) |
        | norm weights / all biases     | one / zero                                            |
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if p.ndim == 1:
                    p.fill_(1.0 if name.endswith("weight") else 0.0)
                elif name.endswith(("o.weight", "down.weight")):
                    p.zero_()
                else:
                    std = 0.02 if name.startswith(("embed", "pos", "head")) else self.config.d_model**-0.5
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Move or cast as any module, but keep the rotary tables in fp32: bf16 has no angle to spare."""
        super()._apply(fn, recurse)
        if self.config.position == "rotary" and self.rope_cos.dtype != torch.float32:
            cos, sin = rotary_tables(self.config, self.config.context)
            self.rope_cos, self.rope_sin = cos.to(self.rope_cos.device), sin.to(self.rope_sin.device)
        return self

    def sites(self) -> list[str]:
        """Every site that taps can read or edit, in the order of computation."""
        blocks = [f"blocks.{i}.{site}" for i in range(self.config.n_layer) for site in BLOCK_SITES]
        return ["embed", *blocks, "final_norm"]

    def forward(
        self,
        tokens_BT: Tensor,
        taps: Taps | None = None,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, pos, vocab] for ``tokens_BT`` int64 [batch, pos].

        ``cache`` holds the keys and values of earlier positions and is extended in place.
        ``positions_BT`` int64 [batch, pos] overrides 0..T-1 (+ cached length): left-padded batches.
        ``mask`` bool [batch, 1, pos, pos_attended], True = attend, replaces the causal mask.
        Raises ValueError when a sequence is longer than ``config.context``. With ``taps.stop_early`` the
        residual stream [batch, pos, d_model] comes back in place of logits.
        """
        x = self.hidden(tokens_BT, taps, cache=cache, positions_BT=positions_BT, mask=mask)
        return x if taps is not None and taps.done else self.unembed(x)

    def hidden(
        self,
        tokens_BT: Tensor,
        taps: Taps | None = None,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The normed residual stream before the head [batch, pos, d_model]; arguments as in ``forward``."""
        if taps is not None:
            taps.check(self.sites())
        T, past = tokens_BT.shape[1], cache.length if cache is not None else 0
        if past + T > self.config.context:
            raise ValueError(f"{past + T} positions exceed the model's context of {self.config.context}")
        x = self.embed(tokens_BT)
        if self.config.position == "learned":
            at = torch.arange(past, past + T, device=x.device) if positions_BT is None else positions_BT
            x = x + self.pos(at)
        where = self._where(T, past, positions_BT, mask)
        x = taps("embed", x) if taps is not None else x
        for block in self.blocks:
            x = block(x, where, taps, cache)
            if taps is not None and taps.done:
                return x
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        return taps("final_norm", x) if taps is not None else x

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [..., vocab] of normed residuals [..., d_model]."""
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)

    def _where(self, T: int, past: int, positions_BT: Tensor | None, mask: Tensor | None) -> Where:
        if mask is None and past and T > 1:  # new tokens see all of the cache and the earlier new ones
            mask = torch.ones(T, past + T, dtype=torch.bool, device=self.embed.weight.device).tril(past)
        if self.config.position != "rotary":
            return Where(None, None, mask)
        if positions_BT is None:
            return Where(self.rope_cos[past : past + T], self.rope_sin[past : past + T], mask)
        return Where(self.rope_cos[positions_BT][:, None], self.rope_sin[positions_BT][:, None], mask)
