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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.model.aliases import Aliases, aliases
from glasshouse.model.attend import Rule, attend, attention_pattern, causal_mask
from glasshouse.model.config import N_ROLES, GPTConfig, RopeScaling
from glasshouse.model.norm import RMSNorm, make_norm
from glasshouse.model.roles import role_table, roles_of, spoken
from glasshouse.model.taps import Taps, tap

if TYPE_CHECKING:
    from glasshouse.model.cache import KVCache

BLOCK_SITES = (
    *("resid_pre", "q", "k", "v", "pattern", "z", "attn_out"),
    *("resid_mid", "mlp_pre", "mlp_post", "mlp_out", "resid_post"),
)


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


def rotary_tables(config: GPTConfig, n: int, *, windowed: bool = False) -> tuple[Tensor, Tensor]:
    """cos, sin of every (position, frequency), each [n, rotated / 2], in fp32."""
    half = config.rotated // 2
    theta = (config.rope_theta_window if windowed else None) or config.rope_theta
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    if config.rope_scaling is not None and not (windowed and config.rope_theta_window is not None):
        frequency = stretched(frequency, config.rope_scaling)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def stretched(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies [n] after ``scaling``."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_context * frequency / (2 * math.pi)  # of each pair over the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share left as it was: 1 for fast pairs, 0 for slow
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + R/2]) of the first R dimensions, the half-split layout Hugging Face uses.

    cos, sin: [.., T, R/2]; dimensions beyond R stay as they are.
    """
    R = 2 * cos.shape[-1]
    a, b = x_BHTK[..., :R].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)
    return turned if x_BHTK.shape[-1] == R else torch.cat((turned, x_BHTK[..., R:]), dim=-1)


def project(x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., out] of one input."""
    if torch.compiler.is_compiling() and type(q) is nn.Linear:  # not where the product is another, as in FP8
        return project_at_once(x, q, k, v)
    return q(x), k(x), v(x)


def project_at_once(x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The same by one product with the three matrices under each other: larger products are faster."""
    weight = torch.cat((q.weight, k.weight, v.weight))
    bias = None if q.bias is None else torch.cat((q.bias, k.bias, v.bias))
    made = F.linear(x, weight, bias)
    queries, keys, values = made.split((q.out_features, k.out_features, v.out_features), dim=-1)
    return queries, keys, values


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, H, G, K = config.d_model, config.n_head, config.kv_heads, config.head_width
        self.rule = Rule(config.attn_scale or K**-0.5, config.attn_softcap, config.causal)
        self.q = nn.Linear(D, H * K, bias=config.attn_bias)
        self.k = nn.Linear(D, G * K, bias=config.attn_bias)
        self.v = nn.Linear(D, G * K, bias=config.attn_bias)
        self.o = nn.Linear(H * K, D, bias=config.attn_out_bias)
        if config.qk_norm:
            spans = (K, K) if config.qk_norm_span == "head" else (H * K, G * K)
            self.q_norm, self.k_norm = (RMSNorm(n, config.norm_eps, config.norm_offset) for n in spans)
        if config.value_residual and layer > 0:
            self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))  # of the first layer's values, of its own

    def forward(
        self, x_BTD: Tensor, where: Where, taps: Taps | None = None, cache: KVCache | None = None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = project(x_BTD, self.q, self.k, self.v)
        if self.config.qk_norm and self.config.qk_norm_span == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.view(B, T, -1, self.config.head_width).transpose(1, 2) for x in (q, k, v))
        if self.config.qk_norm and self.config.qk_norm_span == "head":
            q, k = self.q_norm(q), self.k_norm(k)  # q: [B, H, T, K]; k, v: [B, G, T, K]
        if self.config.value_residual:  # Zhou et al. 2024, arXiv 2410.17897
            if not hasattr(self, "mix"):
                where.first_v = v
            elif where.first_v is not None:
                v = self.mix[0] * where.first_v + self.mix[1] * v
        if where.cos is not None and where.sin is not None:
            q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q, k, v = tap(taps, self, "q", q), tap(taps, self, "k", k), tap(taps, self, "v", v)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # [B, G, S, K]
        groups = self.config.n_head // self.config.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if taps is not None and taps.wants(f"blocks.{self.layer}.pattern"):
            pattern = attention_pattern(q, k, where.mask, self.rule)
            z = tap(taps, self, "pattern", pattern) @ v  # [B, H, T, S] @ [B, H, S, K]
        else:
            z = attend(q, k, v, where.mask, self.rule)
        z = tap(taps, self, "z", z)  # [B, H, T, K]
        return self.o(z.transpose(1, 2).reshape(B, T, -1))


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
        pre = tap(taps, self, "mlp_pre", self.gate(x_BTD) if gated else self.up(x_BTD))
        post = activate(self.config.activation, pre)
        if gated:
            post = post * self.up(x_BTD)
        return self.down(tap(taps, self, "mlp_post", post))  # mlp_post: [B, T, F]


class Block(nn.Module):
    """One layer: the residual stream plus attention, plus MLP."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.parallel, self.windowed = layer, config.parallel, config.windowed(layer)
        before, after = config.norm_place != "post", config.norm_place != "pre"

        def norm(wanted: bool) -> nn.Module:
            return make_norm(config, config.d_model) if wanted else nn.Identity()

        self.norm1, self.attn, self.post1 = norm(before), Attention(config, layer), norm(after)
        self.norm2, self.mlp, self.post2 = norm(before), MLP(config, layer), norm(after)
        signals = config.roles is not None and config.roles.layers
        self.signal = nn.Embedding(N_ROLES, config.d_model) if signals else None

    def forward(
        self, x: Tensor, where: Where, taps: Taps | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x = self.signalled(tap(taps, self, "resid_pre", x), where)
        attended = tap(taps, self, "attn_out", self.post1(self.attn(self.norm1(x), where, taps, cache)))
        mid = tap(taps, self, "resid_mid", x + attended)
        made = tap(taps, self, "mlp_out", self.post2(self.mlp(self.norm2(x if self.parallel else mid), taps)))
        return tap(taps, self, "resid_post", mid + made)

    def signalled(self, x: Tensor, where: Where) -> Tensor:
        """x with the signal of its tokens' roles, in a model that has one (``roles.layers``)."""
        if self.signal is None:
            return x
        if where.roles is None:
            raise UsageError("this model's layers read roles; run it from its tokens, not from a layer on")
        return x + self.signal(where.roles)


class Where:
    """Where the new tokens stand: rotary tables for their positions and who may attend to whom.

    ``first_v``: the first layer's values of this pass, for ``value_residual``. ``roles``: int64 [B, T].
    """

    __slots__ = ("cos", "first_v", "mask", "roles", "sin")

    def __init__(
        self, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, roles: Tensor | None = None
    ):
        self.cos, self.sin, self.mask, self.roles = cos, sin, mask, roles
        self.first_v: Tensor | None = None


class GPT(nn.Module):
    """A language model. ``model(tokens)`` gives logits [batch, pos, vocab]."""

    rope: Tensor
    rope_window: Tensor
    role_table: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.pos = nn.Embedding(config.context, config.d_model)
        if config.roles is not None:
            self.register_buffer("role_table", role_table(config, self.embed.weight.device), persistent=False)
            if config.roles.segment:
                self.segment = nn.Embedding(N_ROLES, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = make_norm(config, config.d_model)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.run_block: Callable[..., Tensor] = Block.__call__  # `compiled.compile_blocks` puts a faster one
        self.make_tables()

    def make_tables(self) -> None:
        """(Re)compute the rotary tables [2 (cos, sin), context, rotated / 2] on the parameters' device."""
        if self.config.position != "rotary":
            return
        device = self.embed.weight.device
        for name, windowed in (("rope", False), ("rope_window", True)):
            if not windowed or self.config.rope_theta_window is not None:
                tables = torch.stack(rotary_tables(self.config, self.config.context, windowed=windowed))
                self.register_buffer(name, tables.to(device), persistent=False)

    def init_weights(self, seed: int) -> GPT:
        """Initialise every parameter from ``seed``: the same bits for the same torch and CPU capability.

        | parameter                     | distribution                                          |
        |-------------------------------|-------------------------------------------------------|
        | embeddings, head              | normal, std 0.02 (GPT-2)                              |
        | vectors of roles              | zero: the model starts as the one without them        |
        | q, k, v, gate, up             | normal, std d_model ** -0.5                           |
        | o, down (write to the stream) | zero: each block starts as the identity (muP, Yang et al. 2022) |
        | norm weights / all biases     | one (zero with norm_offset) / zero                    |
        | value mix                     | half the first layer's, half its own                  |
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if name.endswith("mix"):
                    p.fill_(0.5)
                elif p.ndim == 1:
                    p.fill_(1.0 if name.endswith("weight") and not self.config.norm_offset else 0.0)
                elif name.endswith(("o.weight", "down.weight", "segment.weight", "signal.weight")):
                    p.zero_()
                else:
                    std = 0.02 if name.startswith(("embed", "pos", "head")) else self.config.d_model**-0.5
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Move or cast as any module, but keep the rotary tables in fp32: bf16 has no angle to spare."""
        super()._apply(fn, recurse)
        if self.config.position == "rotary" and self.rope.dtype != torch.float32:
            self.make_tables()
        return self

    def sites(self) -> list[str]:
        """Every site that taps can read or edit, in the order of computation."""
        blocks = [f"blocks.{i}.{site}" for i in range(self.config.n_layer) for site in BLOCK_SITES]
        return ["embed", *blocks, "final_norm"]

    def hook_names(self) -> Aliases:
        """TransformerLens names of these sites, and why the others have none."""
        return aliases(self.config)

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
            taps.check(self.sites(), self.hook_names)
        x, full, local = self.begin(tokens_BT, cache, positions_BT, mask)
        x = taps("embed", x) if taps is not None else x
        for block in self.blocks:
            if taps is not None and taps.done:
                return x
            x = self.run_block(block, x, local if block.windowed else full, taps, cache)
        if taps is not None and taps.done:
            return x
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        x = self.norm(x)
        return taps("final_norm", x) if taps is not None else x

    def begin(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Where, Where]:
        """The stream before the first block [batch, pos, d_model]; what full and windowed layers need."""
        T, past = tokens_BT.shape[1], cache.length if cache is not None else 0
        if past + T > self.config.context:
            raise ValueError(f"{past + T} positions exceed the model's context of {self.config.context}")
        roles = self.roles_of(tokens_BT, cache)
        x = self.spoken(self.embed(tokens_BT), roles)
        if self.config.embed_scale is not None:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device=x.device)
        if self.config.position == "learned":
            at = torch.arange(past, past + T, device=x.device) if positions_BT is None else positions_BT
            x = x + self.pos(at)
        return x, *self.where(T, past, positions_BT, mask, roles)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    @property
    def head_weight(self) -> Tensor:
        """The unembedding [vocab, d_model]."""
        return self.embed.weight if self.config.tied else self.head.weight

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [..., vocab] of normed residuals [..., d_model]."""
        logits = F.linear(x, self.head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def roles_of(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor | None:
        """The roles int64 [batch, pos] of tokens after those in ``cache``, which remembers them.

        None for a model that reads no roles. ValueError for a cache made without room for them.
        """
        if self.config.roles is None:
            return None
        if cache is None:
            return roles_of(self.role_table, tokens_BT)
        if cache.roles is None:
            raise ValueError("this model reads roles and the cache has no room for them: another model's?")
        past = cache.length
        roles = roles_of(self.role_table, tokens_BT, cache.roles[:, past - 1] if past else None)
        cache.roles[:, past : past + tokens_BT.shape[1]] = roles
        return roles

    def spoken(self, x: Tensor, roles: Tensor | None) -> Tensor:
        """Token embeddings [batch, pos, d_model] as words of their roles; as they are where none are read."""
        if self.config.roles is None:
            return x
        if roles is None:
            raise UsageError("this model reads roles; give those of the embeddings' tokens (GPT.roles_of)")
        segment = self.segment.weight if self.config.roles.segment else None
        return spoken(x, roles, segment, self.config.roles.rotate)

    def where(
        self,
        T: int,
        past: int = 0,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        roles: Tensor | None = None,
    ) -> tuple[Where, Where]:
        """What full and windowed layers need to know about T new tokens after ``past`` cached ones."""
        S, device, config = past + T, self.embed.weight.device, self.config
        if mask is None and past and T > 1 and config.causal:
            mask = causal_mask(T, S, device)  # new tokens see all of the cache and the earlier new ones
        at = slice(past, S) if positions_BT is None else positions_BT

        def turned(name: str) -> tuple[Tensor | None, Tensor | None]:
            if config.position != "rotary":
                return None, None
            cos, sin = getattr(self, name)[:, at]
            return (cos, sin) if positions_BT is None else (cos[:, None], sin[:, None])

        full = Where(*turned("rope"), mask, roles)
        if config.window_tokens is None:
            return full, full
        if config.window_tokens < S:
            window = causal_mask(T, S, device, config.window_tokens)
            mask = window if mask is None else mask & window
        table = "rope" if config.rope_theta_window is None else "rope_window"
        return full, Where(*turned(table), mask, roles)
