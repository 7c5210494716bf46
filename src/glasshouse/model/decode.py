"""The fast path of generation: the model's weights laid out once for many small steps.

`Decoder` computes what `GPT.forward` computes, equal in tests for every feature of the config, and is the
code that `generate` runs. It shows no sites: to read or edit activations use the model itself.

What pays on a CPU, where a step is bound by reading weights (measured by benchmarks/bench_generate.py):
weights packed by oneDNN ahead of time, query/key/value and gate/up in one product, activation and residual
sum inside the product, keys and values kept in fp32 (small bf16 attention products are slower), no mask or
rotary table made twice.

**A row does not depend on its batch mates, to the bit**, on CPUs: packed products of at least two rows give
every row the same bits whatever the number of rows, so fewer rows are filled up (`LEAST_ROWS`); prompts are
read in chunks of `CHUNK` positions at fixed places; attention reads whole spans of slots. These are
properties of oneDNN's and MKL's kernels that tests pin down, not promises of theirs; elsewhere (GPU, fp16)
rows agree up to rounding.

Shape legend: B rows, T new positions, N = B T, S slots, D d_model, H query heads, G key/value heads,
K d_head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.cache import SlotCache
from glasshouse.model.gpt import GPT, Block, activate, rotate
from glasshouse.model.int8 import VECTOR, int8_linear, quantize
from glasshouse.model.norm import RMSNorm
from glasshouse.model.roles import roles_of, spoken

CHUNK = 32  # positions of a prompt computed together
# Rows that a packed product has at least. Two would do for equal bits; in bf16 oneDNN's kernel for four rows
# takes 0.7 of the time of the ones for two, and 0.85 of that for one (and half of the unpacked product's).
LEAST_ROWS = {torch.bfloat16: 4, torch.float32: 2}
FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can lay out weights of this type ahead of time here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class Matrix:
    """``x @ W.T + b`` of x [N, in] for weights that stay as they are: plain, packed, or in 8 bits."""

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype, how: str
    ):
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.how, self.scale = how, weight.new_empty(0)
        given = [b.to(dtype) for b in biases if b is not None]
        self.bias = torch.cat(given) if given else None
        self.spare = 0
        if how == "int8":
            self.spare = -weight.shape[1] % VECTOR
            q, self.scale = quantize(weight)
            self.weight = F.pad(q, (0, self.spare)).contiguous()
        else:
            self.weight = weight.detach().to(dtype).contiguous()
            if how == "packed":
                self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def __call__(self, x: Tensor, activation: str | None = None, plus: Tensor | None = None) -> Tensor:
        """[N, out], then through ``activation``, then with ``plus`` added."""
        if self.how == "packed":
            if plus is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add")
            name, algorithm = FUSED.get(activation or "", ("none", ""))
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
            return activate(activation, y) if activation and name == "none" else y
        if self.how == "int8":
            y = int8_linear(F.pad(x, (0, self.spare)) if self.spare else x, self.weight, self.scale)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        y = activate(activation, y) if activation else y
        return y if plus is None else plus + y


def filled_up(x: Tensor, least: int) -> Tensor:
    """x [N, D], with copies of its first row behind it up to ``least`` rows."""
    if len(x) >= least:
        return x
    copies = x[:1].expand(least - len(x) + (len(x) == 1), -1)
    return copies.contiguous() if len(x) == 1 else torch.cat((x, copies))


def norm_of(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The norm as a function with its weights cast once; None for one that does nothing."""
    if isinstance(module, RMSNorm):
        gain, shape, eps = module.weight.detach().to(dtype), module.normalized_shape, module.eps
        if module.offset:
            wide = 1 + module.weight.detach().to(dtype).float()
            return lambda x: F.rms_norm(x.float(), shape, wide, eps).to(x.dtype)
        return lambda x: F.rms_norm(x, shape, gain, eps)
    if isinstance(module, nn.LayerNorm):
        weight, bias = module.weight.detach().to(dtype), module.bias.detach().to(dtype)
        width, small = module.normalized_shape, module.eps
        return lambda x: F.layer_norm(x, width, weight, bias, small)
    return None


class Layer:
    """One block's weights, laid out."""

    def __init__(self, block: Block, dtype: torch.dtype, how: str):
        attn, mlp = block.attn, block.mlp
        three = (attn.q, attn.k, attn.v)
        self.qkv = Matrix([m.weight for m in three], [m.bias for m in three], dtype, how)
        self.o = Matrix([attn.o.weight], [attn.o.bias], dtype, how)
        wide = (mlp.gate, mlp.up) if hasattr(mlp, "gate") else (mlp.up,)
        self.up = Matrix([m.weight for m in wide], [m.bias for m in wide], dtype, how)
        self.down = Matrix([mlp.down.weight], [mlp.down.bias], dtype, how)
        self.norm1, self.norm2 = norm_of(block.norm1, dtype), norm_of(block.norm2, dtype)
        self.post1, self.post2 = norm_of(block.post1, dtype), norm_of(block.post2, dtype)
        self.q_norm = norm_of(attn.q_norm, dtype) if hasattr(attn, "q_norm") else None
        self.k_norm = norm_of(attn.k_norm, dtype) if hasattr(attn, "k_norm") else None
        self.mix = attn.mix.detach().to(dtype) if hasattr(attn, "mix") else None
        self.windowed = bool(block.windowed)
        self.signal = None if block.signal is None else block.signal.weight.detach().to(dtype)


class Here:
    """Where the new tokens stand, made once a step and read by every layer.

    ``turn``, ``turn_local``: cos and sin [N, 1, rotated / 2]; ``bias``, ``bias_local``: 0 or -inf
    [B, 1, T, S], for full and windowed layers. ``start``: the first slot, when it is the same for all rows.
    """

    def __init__(self, decoder: Decoder, cache: SlotCache, rows: int, T: int):
        model, config, device = decoder.model, decoder.config, decoder.device
        starts = cache.lengths[:rows]
        self.rows, self.T, self.filled = rows, T, max(starts) + T
        self.start = starts[0] if min(starts) == max(starts) else None
        first = torch.tensor(starts, device=device)
        self.slots = first[:, None] + torch.arange(T, device=device)  # [B, T]
        self.row_index = torch.arange(rows, device=device)[:, None]
        # Padding after a prompt may stand beyond the context; what is computed there is never read.
        self.positions = self.slots.clamp(max=config.context - 1).flatten()
        self.turn = self.turn_local = None
        if config.position == "rotary":
            self.turn = model.rope[:, self.positions, None].unbind(0)
            windowed = config.rope_theta_window is not None
            self.turn_local = model.rope_window[:, self.positions, None].unbind(0) if windowed else self.turn
        S = cache.read(0, rows, self.filled)[0].shape[2]
        ahead = torch.arange(S, device=device) - self.slots[:, :, None]  # [B, T, S]; > 0: not yet written
        hidden = torch.tensor(float("-inf"), dtype=decoder.attend_dtype, device=device)
        shown = torch.zeros((), dtype=decoder.attend_dtype, device=device)
        self.bias = self.bias_local = torch.where(ahead > 0, hidden, shown)[:, None]
        if config.window_tokens is not None and config.window_tokens < self.filled:
            self.bias_local = torch.where((ahead > 0) | (ahead <= -config.window_tokens), hidden, shown)[
                :, None
            ]
        self.first_v: Tensor | None = None
        self.roles: Tensor | None = None  # [N], filled up as the stream is


class Decoder:
    """A model ready to generate. Weights changed after it was made are not seen.

    ``dtype``: of weights and activations, the model's own if None. ``weights="int8"`` keeps matrices in
    8 bits (`int8.py`) with bf16 activations; `int8_twin` measures what that costs.
    Raises UsageError for a model that sees later positions, and on CPUs for an unknown layout.
    """

    def __init__(
        self, model: GPT, *, dtype: torch.dtype | None = None, weights: Literal["model", "int8"] = "model"
    ):
        if not model.config.causal:
            raise UsageError("this model sees later positions (causal=False): it cannot continue a text")
        if weights not in ("model", "int8"):
            raise UsageError(f"weights must be 'model' or 'int8', not {weights!r}")
        own = model.embed.weight
        self.model, self.config, self.device = model, model.config, own.device
        self.dtype = dtype or (torch.bfloat16 if weights == "int8" else own.dtype)
        how = "int8" if weights == "int8" else "packed" if packs(self.device, self.dtype) else "plain"
        self.how = how
        self.least = LEAST_ROWS[self.dtype] if how == "packed" else 1
        self.attend_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        with torch.inference_mode():
            self.embed = own.detach().to(self.dtype)
            self.pos = (
                model.pos.weight.detach().to(self.dtype) if model.config.position == "learned" else None
            )
            roles = model.config.roles
            self.segment = model.segment.weight.detach().to(self.dtype) if roles and roles.segment else None
            self.layers = [Layer(block, self.dtype, how) for block in blocks]
            self.norm = norm_of(model.norm, self.dtype)
            self.head = Matrix([own if model.config.tied else model.head.weight], [None], self.dtype, how)
        rule = blocks[0].attn.rule
        self.scale, self.softcap = rule.scale, rule.softcap

    def cache(self, rows: int, size: int) -> SlotCache:
        """An empty cache for ``rows`` sequences of up to ``size`` positions."""
        # Prompts are read in whole chunks, so the last one may reach beyond the sequence.
        return SlotCache(self.config, rows, -(-size // CHUNK) * CHUNK, self.attend_dtype, self.device)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], cache: SlotCache) -> Tensor:
        """Read prompts, longest first, into ``cache``; what its lengths say is there is not computed again.

        Returns the normed residual [B, D] at each prompt's last token. ``cache.lengths`` must be a multiple
        of `CHUNK`, the same for all rows, and below every prompt's length.
        """
        lengths = [len(p) for p in prompts]
        start = cache.lengths[0]
        if lengths != sorted(lengths, reverse=True) or start % CHUNK or start >= lengths[-1]:
            raise ValueError(f"prompts of {lengths} tokens after {start} are not longest first, or too short")
        out = torch.empty(len(prompts), self.config.d_model, dtype=self.dtype, device=self.device)
        for at in range(start, lengths[0], CHUNK):
            rows = sum(n > at for n in lengths)
            part = [list(p[at : at + CHUNK]) for p in prompts[:rows]]
            tokens = torch.tensor([p + [0] * (CHUNK - len(p)) for p in part], device=self.device)
            cache.lengths[:rows] = [at] * rows
            x = self._hidden(tokens, cache).view(rows, CHUNK, -1)
            ending = [b for b in range(rows) if lengths[b] <= at + CHUNK]
            out[ending] = x[ending, [lengths[b] - 1 - at for b in ending]]
        cache.lengths = lengths
        return out

    @torch.inference_mode()
    def step(self, tokens_B: Tensor, cache: SlotCache) -> Tensor:
        """Append one token id a row; the normed residual [B, D] there."""
        x = self._hidden(tokens_B[:, None], cache)
        cache.lengths = [n + 1 for n in cache.lengths]
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits [B, V] of normed residuals [B, D]. CheckpointError when they are not finite."""
        logits = self.head(filled_up(x, self.least))[: len(x)].float()
        cap = self.config.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged or overflow in this precision; "
                "load an earlier checkpoint or run it in fp32"
            )
        return logits

    def _hidden(self, tokens_BT: Tensor, cache: SlotCache) -> Tensor:
        """Normed residuals [N, D] of new tokens, whose keys and values are written."""
        B, T = tokens_BT.shape
        here = Here(self, cache, B, T)
        x = self.embed[tokens_BT.flatten()]
        if self.config.roles is not None:
            roles = self._roles(tokens_BT, here, cache)
            x = spoken(x, roles, self.segment, self.config.roles.rotate)
            here.roles = filled_up(roles[:, None], self.least)[:, 0]
        if self.config.embed_scale is not None:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device=x.device)
        if self.pos is not None:
            x = x + self.pos[here.positions]
        x = filled_up(x, self.least)
        for i, layer in enumerate(self.layers):
            x = self._block(i, layer, x, here, cache)
        x = x if self.norm is None else self.norm(x)
        return x[: B * T]

    def _roles(self, tokens_BT: Tensor, here: Here, cache: SlotCache) -> Tensor:
        """Roles [N] of new tokens, which the cache remembers."""
        if cache.roles is None:
            raise UsageError("this model reads roles and the cache holds none; make it with Decoder.cache")
        starts, rows = here.slots[:, 0], here.row_index[:, 0]
        before = torch.where(starts > 0, cache.roles[rows, (starts - 1).clamp(min=0)], 0)
        roles = roles_of(self.model.role_table, tokens_BT, before)
        cache.roles[here.row_index, here.slots] = roles
        return roles.flatten()

    def _block(self, i: int, layer: Layer, x: Tensor, here: Here, cache: SlotCache) -> Tensor:
        if layer.signal is not None and here.roles is not None:
            x = x + layer.signal[here.roles]
        z = self._attention(i, layer, x if layer.norm1 is None else layer.norm1(x), here, cache)
        if layer.post1 is None:
            mid = layer.o(z, plus=x)
        else:
            mid = x + layer.post1(layer.o(z))
        read = x if self.config.parallel else mid
        read = read if layer.norm2 is None else layer.norm2(read)
        if self.config.mlp == "gated":
            gate, up = layer.up(read).chunk(2, dim=-1)
            made = activate(self.config.activation, gate) * up
        else:
            made = layer.up(read, self.config.activation)
        if layer.post2 is None:
            return layer.down(made, plus=mid)
        return mid + layer.post2(layer.down(made))

    def _attention(self, i: int, layer: Layer, x: Tensor, here: Here, cache: SlotCache) -> Tensor:
        """Mixed values [N, H K] of normed x [N, D]."""
        c, B, T, K = self.config, here.rows, here.T, self.config.head_width
        H, G, N = c.n_head, c.kv_heads, here.rows * here.T
        heads = layer.qkv(x)[:N]
        q, k, v = heads.split((H * K, G * K, G * K), dim=-1)
        if layer.q_norm is not None and layer.k_norm is not None:
            if c.qk_norm_span == "all":
                q, k = layer.q_norm(q), layer.k_norm(k)
            else:
                q, k = layer.q_norm(q.reshape(N, H, K)), layer.k_norm(k.reshape(N, G, K))
        q, k, v = q.reshape(N, H, K), k.reshape(N, G, K), v.reshape(N, G, K)
        if c.value_residual:
            if layer.mix is None:
                here.first_v = v
            elif here.first_v is not None:
                v = layer.mix[0] * here.first_v + layer.mix[1] * v
        turn = here.turn_local if layer.windowed else here.turn
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        self._write(cache.k[i], k.view(B, T, G, K), here)
        self._write(cache.v[i], v.view(B, T, G, K), here)
        keys, values = cache.read(i, B, here.filled)  # [B, G, S, K]
        bias = here.bias_local if layer.windowed else here.bias
        q = q.view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).to(self.attend_dtype)  # [B, G, H / G, T, K]
        z = self._mix(q, keys, values, bias)
        z = z.permute(0, 3, 1, 2, 4).reshape(N, H * K).to(self.dtype)
        return filled_up(z, len(x))

    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """[B, G, R, T, K] of q [B, G, R, T, K] and keys, values [B, G, S, K], which grouped heads share."""
        B, G, R, T, K = q.shape
        if self.device.type != "cpu" and self.softcap is None:
            z = F.scaled_dot_product_attention(
                q.reshape(B, G * R, T, K), keys, values, attn_mask=bias, scale=self.scale, enable_gqa=R > 1
            )
            return z.view(B, G, R, T, K)
        scores = (q.reshape(B, G, R * T, K) * self.scale) @ keys.transpose(-1, -2)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.view(B, G, R, T, -1) + bias[:, :, None]
        pattern = scores.float().softmax(dim=-1).to(values.dtype)
        return (pattern.view(B, G, R * T, -1) @ values).view(B, G, R, T, K)

    @staticmethod
    def _write(store: Tensor, new: Tensor, here: Here) -> None:
        """Put new keys or values [B, T, G, K] into their slots."""
        if here.start is not None:
            store[: here.rows, :, here.start : here.start + here.T] = new.transpose(1, 2)
        else:
            store[here.row_index, :, here.slots] = new.to(store.dtype)
