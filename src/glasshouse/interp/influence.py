"""Which training documents stand behind a read-out: gradient similarity, without a gradient per document.

The score of a document is the dot product of its loss gradient with the gradient of the failing read-out
(TracIn, Pruthi et al. 2020, at one checkpoint): how much one step that fits the document moves the read-out.
A dot product with a fixed vector v is the directional derivative of the document's loss along v, so two
forward passes (at theta + eps v and theta - eps v) give it for a whole batch of documents at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.interp.patching import Margin
from glasshouse.model import GPT

Direction = Mapping[str, Tensor]


def readout_gradient(model: GPT, rows: Sequence[Sequence[int]], readout: Margin) -> dict[str, Tensor]:
    """Gradient, by parameter name, of the mean read-out margin over token rows, scaled to unit norm."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for row in rows:
        logits = model.unembed(model.hidden(torch.tensor([list(row)]))[:, -1])
        grads = torch.autograd.grad(
            readout.margin(logits).sum(), list(parameters.values()), allow_unused=True
        )
        for name, g in zip(parameters, grads, strict=True):
            if g is not None:
                total[name] += g / len(rows)
    norm = torch.sqrt(sum((g.square().sum() for g in total.values()), torch.zeros(())))
    if not torch.isfinite(norm) or norm == 0:
        raise VerificationError("the failing read-out has no gradient; documents cannot be ranked by it")
    return {n: g / norm for n, g in total.items()}


@torch.no_grad()
def document_scores(
    model: GPT,
    direction: Direction,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    *,
    epsilon: float = 0.005,
    rows: int = 128,
) -> np.ndarray:
    """Dot product [n] of each document's summed loss gradient with ``direction`` (unit norm).

    Positive: fitting the document *lowers* the read-out whose gradient ``direction`` is. ``masks`` marks the
    tokens whose prediction counts (1) for each document. Central difference of step ``epsilon`` in
    parameter space: on the demo's models 0.005 is within 0.2% of the scores' spread of the exact products,
    0.05 within 9% (curvature), 0.0003 within 1% (rounding).
    """
    with _moved(model, direction, epsilon):
        plus = _losses(model, documents, masks, rows)
    with _moved(model, direction, -epsilon):
        minus = _losses(model, documents, masks, rows)
    return (plus - minus) / (2 * epsilon)


@contextmanager
def _moved(model: GPT, direction: Direction, amount: float) -> Iterator[None]:
    """The model with ``amount * direction`` added to its parameters; the very same bits come back after."""
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if n in direction}
    try:
        for name, p in model.named_parameters():
            if name in direction:
                p.add_(direction[name], alpha=amount)
        yield
    finally:
        for name, p in model.named_parameters():
            if name in saved:
                p.copy_(saved[name])


def _losses(
    model: GPT, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], rows: int
) -> np.ndarray:
    """Summed masked next-token loss, in nats, of every document."""
    out = np.empty(len(documents))
    order = np.argsort([len(d) for d in documents], kind="stable")
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        width = max(len(documents[i]) for i in chosen)
        tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
        weight = torch.zeros(len(chosen), width)
        for at, i in enumerate(chosen):
            tokens[at, : len(documents[i])] = torch.as_tensor(documents[i], dtype=torch.int64)
            weight[at, : len(masks[i])] = torch.as_tensor(masks[i], dtype=torch.float32)
        row, place = weight[:, 1:].nonzero(as_tuple=True)  # only what counts is unembedded
        logits = model.unembed(model.hidden(tokens[:, :-1])[row, place]).float()
        nats = F.cross_entropy(logits, tokens[row, place + 1], reduction="none") * weight[row, place + 1]
        sums = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row, nats.double())
        out[chosen] = sums.numpy()
    return out
