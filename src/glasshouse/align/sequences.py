"""Prompts with their answers as padded rows, and the log-probabilities of the answers' tokens.

Shape legend: N rows, T tokens in the longest, P = T - 1 predictions, M predictions that count, D d_model,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glasshouse.base.errors import DataError
from glasshouse.model import GPT
from glasshouse.model.partial import hidden_at

Entropy = Literal["none", "number", "gradient"]  # not wanted; without a gradient; with one
LOGITS_AT_ONCE = 2**24  # more than these are made again in the backward pass rather than kept (64 MB)


@dataclass(frozen=True)
class Sequences:
    """``tokens`` int64 [N, T], padded on the right; ``mask`` float32 [N, P], 1 where the prediction at that
    position is of an answer's token; ``last`` int64 [N], where each row's last token stands.
    """

    tokens: Tensor
    mask: Tensor
    last: Tensor

    def take(self, rows: Tensor) -> Sequences:
        """Some of the rows (int64 [n]), without columns that only others need."""
        last = self.last[rows]
        width = int(last.max()) + 1
        return Sequences(self.tokens[rows, :width], self.mask[rows, : width - 1], last)

    def answers(self) -> list[list[int]]:
        """Ids of every row's answer."""
        counts = self.mask.sum(dim=1).long().tolist()
        ends = self.last.tolist()
        rows = self.tokens.tolist()
        return [row[end + 1 - n : end + 1] for row, end, n in zip(rows, ends, counts, strict=True)]


def pack(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    context: int,
    device: torch.device | None = None,
    where: str = "",
) -> Sequences:
    """Rows of prompt and answer. DataError, beginning with ``where``, for an empty prompt or a row that is
    longer than ``context`` + 1 tokens (the last one is predicted, not read).
    """
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    width = max(len(row) for row in rows)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if not prompt or len(row) > context + 1:
            raise DataError(
                f"{where or 'answers'}: row {i} has a prompt of {len(prompt)} tokens and {len(row)} in all; "
                f"a prompt needs at least one, and the model reads {context}: shorten it, or raise context"
            )
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width - 1)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, len(prompt) - 1 : len(row) - 1] = 1
    last = torch.tensor([len(row) - 1 for row in rows])
    return Sequences(tokens.to(device), mask.to(device), last.to(device))


@dataclass(frozen=True)
class Read:
    """One forward pass: ``logp`` fp32 [N, P] of the answers' tokens (0 elsewhere), ``entropy`` [N, P] of the
    predictions (0 where it was not wanted), ``hidden`` [M, D] of those predictions, row after row.
    """

    logp: Tensor
    entropy: Tensor
    hidden: Tensor


def read(model: GPT, rows: Sequences, *, entropy: Entropy = "number") -> Read:
    """Read ``rows`` with ``model``: the last block and the head only where an answer's token is predicted."""
    at = rows.mask.bool()
    targets_M, chosen_MD = rows.tokens[:, 1:][at], hidden_at(model, rows.tokens[:, :-1], at)
    V, M = model.config.vocab_size, chosen_MD.shape[0]
    size = max(1, LOGITS_AT_ONCE // V)
    found = []
    for start in range(0, M, size):
        some = chosen_MD[start : start + size], targets_M[start : start + size]
        if size >= M or not torch.is_grad_enabled():
            found.append(_predict(model, *some, entropy))
        else:
            found.append(checkpoint(_predict, model, *some, entropy, use_reentrant=False))
    empty = torch.zeros(rows.mask.shape, device=rows.mask.device)
    if not found:
        return Read(empty, empty, chosen_MD)
    logp_M, entropy_M = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Read(
        empty.masked_scatter(at, logp_M), torch.zeros_like(empty).masked_scatter(at, entropy_M), chosen_MD
    )


def _predict(model: GPT, x_MD: Tensor, targets_M: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    logp_MV = model.unembed(x_MD).float().log_softmax(-1)
    logp_M = logp_MV.gather(-1, targets_M[:, None])[:, 0]
    if entropy == "none":
        return logp_M, torch.zeros_like(logp_M)
    spread = logp_MV if entropy == "gradient" else logp_MV.detach()
    return logp_M, -(spread.exp() * spread).sum(-1)


@torch.no_grad()
def logprobs(model: GPT, rows: Sequences, batch_size: int = 64) -> Tensor:
    """fp32 [N, P]: `read`'s log-probabilities without a gradient, so many rows at a time."""
    out = torch.zeros_like(rows.mask)
    for start in range(0, len(rows.tokens), batch_size):
        at = torch.arange(start, min(start + batch_size, len(rows.tokens)), device=rows.tokens.device)
        some = rows.take(at)
        out[at, : some.mask.shape[1]] = read(model, some, entropy="none").logp
    return out
