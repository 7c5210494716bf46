"""The residual stream at some positions only: what nobody reads, the last block does not compute.

A score at an answer's end reads one position of a row, log-probabilities of an answer those that predict it.
Below the last block every position is needed, for later ones attend to it. In the last block the others are
needed as keys and values alone: no query, no pattern, no MLP. Equal to `GPT.hidden` there, gradients too.

Shape legend: B rows, T positions, M positions that are read, Q the most of them in a row, D d_model,
H query heads, G key/value heads, K d_head.
"""

from __future__ import annotations

from torch import Tensor

from glasshouse.model.attend import attend, causal_mask
from glasshouse.model.gpt import GPT, Attention, Block, Where, rotate


def hidden_at(model: GPT, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
    """``model.hidden(tokens_BT)[at_BT]``, [M, d_model], row after row; ``at_BT`` bool [B, T].

    Raises ValueError when a row is longer than the context.
    """
    x, full, local = model.begin(tokens_BT)
    *before, last = [block for block in model.blocks if isinstance(block, Block)]
    for block in before:
        x = model.run_block(block, x, local if block.windowed else full, None, None)
    out: Tensor = model.norm(_at_places(last, x, local if last.windowed else full, Places(at_BT)))
    return out


class Places:
    """Where the stream is read: ``rows`` and ``columns`` int64 [M], and ``order``, their place among the Q of
    their row: the last ones, so that as many positions follow as places at most (`blocked_attention`).
    """

    def __init__(self, at_BT: Tensor):
        self.rows, self.columns = at_BT.nonzero(as_tuple=True)
        left = at_BT.flip(1).cumsum(dim=1).flip(1)[at_BT]
        most = int(left.max()) if len(left) else 1
        self.order, self.shape = most - left, (at_BT.shape[0], most)
        self.flat = self.rows * at_BT.shape[1] + self.columns

    def of(self, x_BTD: Tensor) -> Tensor:
        """[M, D]."""
        return x_BTD.flatten(0, 1).index_select(0, self.flat)

    def spread(self, x_M: Tensor) -> Tensor:
        """[B, Q, ...] of [M, ...]; places left over are 0."""
        return x_M.new_zeros(*self.shape, *x_M.shape[1:]).index_put((self.rows, self.order), x_M)


def _at_places(block: Block, x_BTD: Tensor, where: Where, places: Places) -> Tensor:
    """`Block.forward` at ``places``: [M, D]."""
    x_BTD = block.signalled(x_BTD, where)
    x = places.of(x_BTD)
    mid = x + block.post1(_attended(block.attn, block.norm1(x_BTD), where, places))
    made: Tensor = block.post2(block.mlp(block.norm2(x if block.parallel else mid)))
    return mid + made


def _attended(attn: Attention, x_BTD: Tensor, where: Where, places: Places) -> Tensor:
    """`Attention.forward` at ``places``: [M, D]; keys and values are of all positions."""
    config, (B, T, _), K = attn.config, x_BTD.shape, attn.config.head_width
    q, k, v = attn.q(places.of(x_BTD)), attn.k(x_BTD), attn.v(x_BTD)
    if config.qk_norm and config.qk_norm_span == "all":
        q, k = attn.q_norm(q), attn.k_norm(k)
    q = q.view(-1, config.n_head, K)  # [M, H, K]
    k, v = (made.view(B, T, -1, K).transpose(1, 2) for made in (k, v))  # [B, G, T, K]
    if config.qk_norm and config.qk_norm_span == "head":
        q, k = attn.q_norm(q), attn.k_norm(k)
    if hasattr(attn, "mix") and where.first_v is not None:
        v = attn.mix[0] * where.first_v + attn.mix[1] * v
    if where.cos is not None and where.sin is not None:
        q = rotate(q, where.cos[places.columns, None], where.sin[places.columns, None])
        k = rotate(k, where.cos, where.sin)
    if (groups := config.n_head // config.kv_heads) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q = places.spread(q).transpose(1, 2)  # [B, H, Q, K]
    z = attend(q, k, v, _seen(where, places, T, config.causal), attn.rule)
    z = z.transpose(1, 2)[places.rows, places.order]  # [M, H, K]
    out: Tensor = attn.o(z.flatten(1))
    return out


def _seen(where: Where, places: Places, T: int, causal: bool) -> Tensor | None:
    """bool [B, 1, Q, T], True = attend; None where every position sees all."""
    mask = where.mask
    if mask is None and causal:
        mask = causal_mask(T, T, places.columns.device)
    if mask is None:
        return None
    # Places left over read as the first position does, and are thrown away.
    return mask[places.spread(places.columns)][:, None]


__all__ = ["hidden_at"]
