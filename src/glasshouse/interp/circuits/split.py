"""The model's forward pass, taken apart: every head's query, key and value may read a stream of its own.

`Split.run` computes the model reader by reader. What a reader sees is decided by a `Feed`: the whole stream
(then the result is the model's own), the stream with chosen edges cut, or the stream plus something whose
gradient is wanted. All methods in this room are feeds over this one pass.

Norms are recomputed from what is read or written in the same pass, never frozen. A norm *after* attention
(``norm_place`` post or both) couples the heads: a head's output is its share of what that norm puts out, and
its scale is that of all heads of the layer together. What no edge carries (learned positions where they are
no node of their own, the bias attention adds, the shift of such a norm) is the feed's ``rest``.

Shape legend: B rows, T positions, D d_model, H query heads, G key/value heads, K d_head, W writers,
R readers.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits.graph import Graph
from glasshouse.model import GPT
from glasshouse.model.attend import attend
from glasshouse.model.cache import KVCache
from glasshouse.model.gpt import Attention, Block, Where, rotate
from glasshouse.model.norm import RMSNorm


class Feed(Protocol):
    """What readers see of what writers wrote."""

    def write(self, written: Tensor) -> None:
        """Take the outputs [w, B, T, D] of the next w writers."""

    def write_rest(self, rest: Tensor) -> None:
        """Take what no edge carries, of a shape that broadcasts to [B, T, D]."""

    def read(self, readers: slice) -> Tensor:
        """The inputs [R, B, T, D] of these readers, from all that was written so far."""
        ...


class Stream:
    """The feed of the model itself: every reader sees the sum of everything. Keeps what was written.

    ``nudges`` [R - skipped, B, T, D]: added to each reader's input, so that gradients with respect to it can
    be taken; the first ``skipped`` readers have none, because nobody runs them.
    """

    def __init__(self, nudges: Tensor | None = None, skipped: int = 0):
        self.nudges, self.skipped = nudges, skipped
        self.written: list[Tensor] = []
        self.rests: list[Tensor] = []  # one before the first block, one a layer
        self.total: Tensor | None = None

    def write(self, written: Tensor) -> None:
        self.written.append(written)
        for one in written:
            self.total = one if self.total is None else self.total + one

    def write_rest(self, rest: Tensor) -> None:
        self.rests.append(rest)
        self.total = rest if self.total is None else self.total + rest

    def read(self, readers: slice) -> Tensor:
        assert self.total is not None, "nothing was written"
        if self.nudges is None:
            return self.total.expand(readers.stop - readers.start, *self.total.shape)
        return self.total + self.nudges[readers.start - self.skipped : readers.stop - self.skipped]


class Cut:
    """The feed of many edge sets at once: a cut edge brings the alternative output of its writer.

    ``keep`` [sets, W, R]: 1 = the edge brings what its writer writes in this very pass, 0 = the alternative,
    between = a mixture. ``alternative`` [W, n, T, D]: each writer's output to put in place. Rows of the pass
    are sets * n, set by set.
    """

    def __init__(self, keep: Tensor, alternative: Tensor):
        self.keep, self.alternative = keep, alternative
        self.parts: list[Tensor] = []  # [w, sets or 1, n, T, D]: live less alternative
        self.count = 0
        self.base: Tensor = alternative.new_zeros(())  # alternatives and rests, [sets or 1, n, T, D]

    def write(self, written: Tensor) -> None:
        w, n = len(written), self.alternative.shape[1]
        other = self.alternative[self.count : self.count + w]
        live = written.reshape(w, -1, n, *written.shape[2:])  # n rows stand for every set alike
        self.parts.append(live - other.unsqueeze(1))
        self.base = self.base + other.sum(0)
        self.count += w

    def write_rest(self, rest: Tensor) -> None:
        n = self.alternative.shape[1]
        self.base = self.base + (rest.reshape(-1, n, *rest.shape[1:]) if rest.ndim == 3 else rest)

    def read(self, readers: slice) -> Tensor:
        sets, n = len(self.keep), self.alternative.shape[1]
        parts = torch.cat([p.expand(-1, sets, -1, -1, -1) for p in self.parts])
        keep = self.keep[:, : self.count, readers].to(parts)
        seen = torch.matmul(keep.transpose(1, 2), parts.flatten(2).transpose(0, 1))  # [sets, R, n T D]
        seen = seen.unflatten(-1, parts.shape[2:]) + self.base.expand(sets, n, *parts.shape[3:])[:, None]
        return seen.transpose(0, 1).flatten(1, 2)  # [R, sets * n, T, D]


class Split:
    """A model whose parts can be run one by one, each on inputs of its own.

    ``prefix``: keys and values of positions before those computed, the same for all rows of a set.
    UsageError for models whose matrices are not plain ``nn.Linear`` (quantised ones).
    """

    def __init__(self, model: GPT, graph: Graph):
        self.model, self.graph, self.config = model, graph, model.config
        for name, part in model.named_modules():
            if name.endswith(("attn.q", "attn.k", "attn.v", "attn.o")) and type(part) is not nn.Linear:
                raise UsageError(f"{name} is a {type(part).__name__}; circuits need plain matrices")
        self.groups = self.config.n_head // self.config.kv_heads

    def block(self, layer: int) -> Block:
        """One layer of the model."""
        block = self.model.blocks[layer]
        assert isinstance(block, Block)
        return block

    def embed(self, tokens: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
        """What enters the stream of ``tokens`` [B, T], and what of it no edge carries.

        Outputs of the first writers [1 or 2, B, T, D] and the rest [T, D].
        """
        x = self.model.embed(tokens)
        if self.config.embed_scale is not None:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device=x.device)
        none = x.new_zeros(x.shape[1:])
        if self.config.position != "learned":
            return x[None], none
        at = self.model.pos(torch.arange(past, past + tokens.shape[1], device=x.device))
        return (torch.stack([x, at.expand_as(x)]), none) if self.graph.split_input else (x[None], at)

    def run(
        self,
        feed: Feed,
        first: tuple[Tensor, Tensor] | None,
        length: int,
        *,
        start: int = 0,
        prefix: KVCache | None = None,
    ) -> Tensor:
        """The normed final stream [B, T, D] of what ``feed`` lets be seen, T = ``length``.

        ``first``: what `embed` returned; None when the feed holds it and all that earlier stages write.
        ``start``: the stage to begin with (`Graph.stage`).
        """
        full, local = self.model.where(length, prefix.length if prefix is not None else 0)
        if first is not None:
            feed.write(first[0])
            feed.write_rest(first[1])
        for stage in range(start, 2 * self.config.n_layer):
            layer, is_mlp = divmod(stage, 2)
            block, read = self.block(layer), self.graph.mlp_reader(layer)
            if not is_mlp:
                x = feed.read(self.graph.attention_readers(layer))
                beside = feed.read(slice(read, read + 1)) if block.parallel else None  # before heads write
                made, rest = self.heads(block, x, local if block.windowed else full, prefix)
                feed.write(made)
                feed.write_rest(rest)
                if beside is not None:
                    feed.write(self.mlp(block, beside))
            elif not block.parallel:
                feed.write(self.mlp(block, feed.read(slice(read, read + 1))))
        last = len(self.graph.readers)
        normed: Tensor = self.model.norm(feed.read(slice(last - 1, last))[0])
        return normed

    def whole_qkv(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [H, B, T, K] not yet rotated, of one stream [B, T, D] read by all."""
        H, attn, x = self.config.n_head, block.attn, block.norm1(x)
        made = []
        for i, linear in enumerate((attn.q, attn.k, attn.v)):
            norm = getattr(attn, ("q_norm", "k_norm", "")[i], nn.Identity())
            y = norm(linear(x)) if self.config.qk_norm_span == "all" else linear(x)
            y = y.unflatten(-1, (-1, self.config.head_width))
            y = y if self.config.qk_norm_span == "all" else norm(y)
            made.append((y if i == 0 else y.repeat_interleave(self.groups, dim=2)).movedim(2, 0))
        assert len(made[0]) == H
        return made[0], made[1], made[2]

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        """Output of the MLP, norms included, of inputs [..., D]."""
        out: Tensor = block.post2(block.mlp(block.norm2(x)))
        return out

    def heads(
        self, block: Block, x: Tensor, where: Where, prefix: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [H, B, T, D] of a layer's heads on inputs [3 H, B, T, D] of their own; and what no head
        wrote, of a shape that broadcasts to [B, T, D].
        """
        q, k, v = self.qkv(block, block.norm1(x))
        z = self.mix(block.attn, q, k, v, where, prefix)  # [H, B, T, K]
        H, _, _, K = z.shape
        out = block.attn.o.weight.view(-1, H, K).permute(1, 2, 0)  # [H, K, D]
        return self.shares(block, torch.matmul(z.flatten(1, 2), out).view(*z.shape[:-1], -1))

    def qkv(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [H, B, T, K], of normed inputs [3 H, B, T, D]: not yet rotated."""
        H, attn = self.config.n_head, block.attn
        made = []
        for i, linear in enumerate((attn.q, attn.k, attn.v)):
            norm = getattr(attn, ("q_norm", "k_norm", "")[i], None)
            made.append(self.project(x[i * H : (i + 1) * H], linear, norm, i == 0))
        return made[0], made[1], made[2]

    def project(self, x: Tensor, linear: nn.Linear, norm: nn.Module | None, is_query: bool) -> Tensor:
        """Each head's part [H, B, T, K] of ``linear``, head h on x[h] of x [H, B, T, D]."""
        H, K = self.config.n_head, self.config.head_width
        part = torch.arange(H, device=x.device)
        part = part if is_query else part // self.groups  # heads of a group share a matrix, not an input
        if norm is not None and self.config.qk_norm_span == "all":
            whole = norm(linear(x)).unflatten(-1, (-1, K))  # a head's input is normed as the model norms it
            return whole[torch.arange(H, device=x.device), :, :, part]
        weight = linear.weight.view(-1, K, x.shape[-1])[part]  # [H, K, D]
        y = torch.matmul(x.flatten(1, 2), weight.transpose(1, 2)).view(*x.shape[:-1], K)
        if linear.bias is not None:
            y = y + linear.bias.view(-1, 1, 1, K)[part]
        return y if norm is None else norm(y)

    def mix(
        self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, where: Where, prefix: KVCache | None
    ) -> Tensor:
        """Attention's mixed values [H, B, T, K] of queries, keys and values [H, B, T, K], not yet rotated."""
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [B, H, T, K]
        if where.cos is not None and where.sin is not None:
            q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        if prefix is not None:
            before = (x[attn.layer][:, :, : prefix.length] for x in (prefix.k, prefix.v))
            pk, pv = (
                p.repeat_interleave(self.groups, dim=1).repeat(len(q) // len(p), 1, 1, 1) for p in before
            )
            k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
        return attend(q, k, v, where.mask, attn.rule).transpose(0, 1)

    def shares(self, block: Block, out: Tensor) -> tuple[Tensor, Tensor]:
        """What each head adds to the stream, of ``out`` [H, B, T, D] before any norm that follows; and the
        rest: attention's bias, and what the norm adds that no head brought.
        """
        bias = block.attn.o.bias
        norm = block.post1
        if isinstance(norm, nn.Identity):
            return out, out.new_zeros(out.shape[-1]) if bias is None else bias
        total = out.sum(0) if bias is None else out.sum(0) + bias
        if isinstance(norm, nn.LayerNorm):
            inverse = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
            share = (out - out.mean(-1, keepdim=True)) * inverse * norm.weight
        else:
            assert isinstance(norm, RMSNorm) and norm.eps is not None
            inverse = (total.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
            share = out * inverse * (1 + norm.weight if norm.offset else norm.weight)
        return share, norm(total) - share.sum(0)
