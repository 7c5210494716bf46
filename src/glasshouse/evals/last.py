"""The forward pass as far as one read-out needs it: the last layer's MLP and the head at one position only.

A check that asks what a model is about to say looks at one position of each row. Attention of the last layer
still runs everywhere (the model's own modules do it, whatever the family), but its MLP, the last norm and the
head are position-wise, so they run where they are read. On two layers that is a quarter of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.model import GPT, KVCache
from glasshouse.model.gpt import Block


def last_hidden(
    model: GPT,
    tokens: Tensor,
    last: Tensor,
    cache: KVCache | None = None,
    stream: list[Tensor] | None = None,
) -> Tensor:
    """The normed residual [batch, d_model] at index ``last`` [batch] of each row of ``tokens`` [batch, pos].

    Equal to ``model.hidden(tokens, cache=cache)[range, last]``. With a list as ``stream`` the residual at
    that position after every block [batch, d_model] is put into it, first layer first. Gradients pass.
    ValueError when a row is longer than the context.
    """
    config = model.config
    T, past = tokens.shape[1], cache.length if cache is not None else 0
    if past + T > config.context:
        raise ValueError(f"{past + T} positions exceed the model's context of {config.context}")
    return continued(model, model.embed(tokens), last, cache, stream, model.roles_of(tokens, cache))


def continued(
    model: GPT,
    x: Tensor,
    last: Tensor,
    cache: KVCache | None = None,
    stream: list[Tensor] | None = None,
    roles: Tensor | None = None,
) -> Tensor:
    """`last_hidden` from token embeddings ``x`` [batch, pos, d_model] on, which may carry gradients.

    ``roles``: those of the tokens (`GPT.roles_of`), for a model that reads them.
    """
    config = model.config
    T, past = x.shape[1], cache.length if cache is not None else 0
    x = model.spoken(x, roles)
    if config.embed_scale is not None:
        x = x * torch.tensor(config.embed_scale, dtype=x.dtype, device=x.device)
    if config.position == "learned":
        x = x + model.pos(torch.arange(past, past + T, device=x.device))
    full, local = model.where(T, past, roles=roles)
    rows = torch.arange(len(x), device=x.device)
    blocks = cast(list[Block], list(model.blocks))
    final = len(blocks) - 1
    for at, block in enumerate(blocks):
        where = local if block.windowed else full
        if at < final:
            x = model.run_block(block, x, where, None, cache)
            if stream is not None:
                stream.append(x[rows, last])
            continue
        x = block.signalled(x, where)
        attended = block.post1(block.attn(block.norm1(x), where, None, cache))
        x = x[rows, last]
        mid = x + attended[rows, last]
        x = mid + block.post2(block.mlp(block.norm2(x if block.parallel else mid)))
        if stream is not None:
            stream.append(x)
    if cache is not None:
        cache.length += T
    return model.norm(x)


def some_logits(model: GPT, hidden: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits [..., len(tokens)] of those tokens alone, of normed residuals [..., d_model]."""
    logits = F.linear(hidden, model.head_weight[list(tokens)])
    cap = model.config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
