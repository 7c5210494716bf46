"""Rows that begin alike: their common prefix is read once and continued many ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasshouse.evals.last import last_hidden
from glasshouse.model import GPT, KVCache

ALIKE = 12  # first tokens in which the rows of a family agree
ENOUGH = 16  # rows from which a family pays for its cache


def families(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """([(length of the common prefix, indices of the rows)], indices of rows that share too little).

    A prefix is never all of a row: its last position has yet to be computed.
    """
    by_start: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_start.setdefault(tuple(row[:ALIKE]), []).append(i)
    found, others = [], []
    for start, members in by_start.items():
        if len(members) < ENOUGH or len(start) < ALIKE:
            others += members
            continue
        whole = [tuple(rows[i]) for i in members]
        low, high = min(whole), max(whole)  # in the order of tuples, so these two differ first
        alike = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
        shortest = min(map(len, whole))
        found.append((min(shortest if alike is None else alike, shortest - 1), members))
    return found, others


@torch.no_grad()
def read_prefix(model: GPT, prefix: Sequence[int]) -> KVCache:
    """Keys and values of a prefix, in one row."""
    cache = KVCache(model.config, 1, len(prefix), torch.float32, model.device)
    model.hidden(torch.tensor([list(prefix)], device=model.device), cache=cache)
    return cache


@torch.no_grad()
def continued_hidden(model: GPT, prefix: KVCache, tokens: Tensor, last: Tensor) -> Tensor:
    """The normed residual [batch, d_model] at ``last`` [batch] of ``tokens`` [batch, pos] that follow it."""
    return last_hidden(model, tokens, last, prefix.expand(len(tokens), prefix.length + tokens.shape[1]))
