"""Attention knockout: positions forbidden to attend to others, and what that does to a metric.

Geva et al. (2023, arXiv 2304.14767, sec. 4): scores of the blocked edges are minus infinity before the
softmax, so what is left is renormalised exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution.effects import Effects, describe
from glasshouse.interp.attribution.rerun import (
    SEQUENCES,
    Base,
    base_run,
    check_rows,
    cut,
    resume,
    row_chunks,
    rule_of,
    seen_by,
    times,
)
from glasshouse.interp.metric import Metric
from glasshouse.model import GPT, Taps
from glasshouse.model.attend import attention_pattern
from glasshouse.model.taps import Edit

Positions = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class Knockout:
    """One knockout: in ``layers``, ``heads`` (None: all) do not see the blocked edges."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """``layers 2-4``, ``a1.h0``."""
        if self.heads is not None:
            return "+".join(f"a{i}.h{h}" for i in self.layers for h in self.heads)
        low, high = self.layers[0], self.layers[-1]
        return f"layer {low}" if low == high else f"layers {low}-{high}"


def edges(n: int, n_pos: int, queries: Positions, keys: Positions) -> Tensor:
    """bool [n, pos, pos]: every edge from a query (row) to a key (column) that is to be blocked.

    Positions are one for all rows, several for all rows, or a Tensor [n] or [n, m], each row's own.
    Negative ones count from the end. UsageError for a position outside.
    """

    def chosen(positions: Positions, what: str) -> Tensor:
        at = torch.as_tensor(positions)
        if isinstance(positions, Tensor) and at.ndim > 0:
            if len(at) != n:
                raise UsageError(f"{what} for {len(at)} rows were given; there are {n}")
            at = at.reshape(n, -1)
        else:
            at = at.reshape(1, -1).expand(n, -1)
        at = torch.where(at < 0, at + n_pos, at)
        if not at.numel() or int(at.min()) < 0 or int(at.max()) >= n_pos:
            raise UsageError(f"{what} must be positions 0 to {n_pos - 1} (or negative, from the end)")
        return torch.zeros(n, n_pos, dtype=torch.bool).scatter(1, at, True)

    return chosen(queries, "queries")[:, :, None] & chosen(keys, "keys")[:, None, :]


@torch.no_grad()
def attention_knockout(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    *,
    queries: Positions,
    keys: Positions,
    knockouts: Iterable[Knockout] | None = None,
    window: int = 1,
    sequences: int = SEQUENCES,
) -> Effects:
    """How much of the metric is lost, in its own units, when ``queries`` cannot attend to ``keys``.

    ``tokens`` int64 [n, pos]; positions as in `edges`. ``knockouts`` (None: around each layer in turn, a
    window of ``window`` layers, as Geva et al. have it; all heads). An edge that the model never had (a later
    key, outside a window) changes nothing. UsageError when a query would see nothing at all, or for layers
    and heads that do not exist.
    """
    tokens = check_rows(model, tokens)
    n, T = tokens.shape
    blocked = edges(n, T, queries, keys).to(model.device)
    tried = _windows(model, window) if knockouts is None else list(knockouts)
    _check(model, tried, blocked)
    lost = []
    for rows in row_chunks(n, sequences):
        base = base_run(model, tokens[rows], metric, rows)
        found = torch.empty(len(tried), len(rows), device=base.values.device, dtype=base.values.dtype)
        order = sorted(range(len(tried)), key=lambda i: tried[i].layers[0])
        for some in cut(order, max(1, sequences // len(rows))):
            logits = _run(model, base, [tried[i] for i in some], blocked[rows])
            found[some] = metric(logits, rows.repeat(len(some))).view(len(some), -1)
        lost.append(base.values - found)
    cells = tuple(
        (f"layer {k.layers[0]}", f"h{k.heads[0]}")
        if k.heads is not None and len(k.heads) == len(k.layers) == 1
        else ("lost", k.name)
        for k in tried
    )
    method = "attention knockout (blocked before the softmax, exact)"
    return Effects(tuple(k.name for k in tried), torch.cat(lost, 1).double(), method, describe(metric), cells)


def each_head(model: GPT) -> list[Knockout]:
    """Every head alone."""
    return [Knockout((i,), (h,)) for i in range(model.config.n_layer) for h in range(model.config.n_head)]


def _windows(model: GPT, window: int) -> list[Knockout]:
    """One knockout around every layer, cut off at the ends."""
    last = model.config.n_layer - 1
    if window < 1:
        raise UsageError(f"a window has one layer or more, not {window}")
    lows = [max(0, i - (window - 1) // 2) for i in range(last + 1)]
    spans = [tuple(range(low, min(last, i + window // 2) + 1)) for i, low in enumerate(lows)]
    return [Knockout(span) for span in dict.fromkeys(spans)]


def _check(model: GPT, knockouts: list[Knockout], blocked: Tensor) -> None:
    config = model.config
    for k in knockouts:
        if not k.layers or any(not 0 <= i < config.n_layer for i in k.layers):
            raise UsageError(f"layers {k.layers}: the model has 0 to {config.n_layer - 1}")
        if k.heads is not None and (not k.heads or any(not 0 <= h < config.n_head for h in k.heads)):
            raise UsageError(f"heads {k.heads}: the model has 0 to {config.n_head - 1}")
    if not knockouts:
        raise UsageError("no knockout was named; leave `knockouts` out for one around every layer")
    for layer in {i for k in knockouts for i in k.layers}:
        left = seen_by(model, layer, blocked.shape[1]) & ~blocked
        if not left.any(-1).all():
            row, query = (~left.any(-1)).nonzero()[0].tolist()
            raise UsageError(
                f"row {row}: position {query} would see nothing in layer {layer}; leave it a key (itself, or "
                "the first token)"
            )


def _run(model: GPT, base: Base, knockouts: list[Knockout], blocked: Tensor) -> Tensor:
    """Logits [knockout * n, pos, vocab]."""
    config, n, T = model.config, len(base.tokens), blocked.shape[1]
    allowed: dict[int, Tensor] = {}  # bool [knockout * n, head, T, T] by layer
    for i, k in enumerate(knockouts):
        for layer in k.layers:
            if layer not in allowed:
                seen = seen_by(model, layer, T)
                allowed[layer] = seen.expand(len(knockouts) * n, config.n_head, T, T).clone()
            heads = list(range(config.n_head)) if k.heads is None else list(k.heads)
            part = allowed[layer][i * n : (i + 1) * n]
            part[:, heads] &= ~blocked[:, None]
    edits: dict[str, Edit] = {}
    for layer, mask in allowed.items():
        edits |= _masked(model, layer, mask)
    first = min(allowed)
    first_v = None if base.first_v is None else times(base.first_v, len(knockouts))
    with Taps(edit=edits) as taps:
        return resume(model, times(base.before[first], len(knockouts)), first, taps, first_v)


def _masked(model: GPT, layer: int, mask: Tensor) -> dict[str, Edit]:
    """Edits that form a layer's pattern anew, under ``mask``."""
    rule, groups = rule_of(model, layer), model.config.n_head // model.config.kv_heads
    now: dict[str, Tensor] = {}

    def note(part: str) -> Edit:
        def keep(x: Tensor) -> Tensor:
            now[part] = x
            return x

        return keep

    def pattern(_: Tensor) -> Tensor:
        return attention_pattern(now["q"], now["k"].repeat_interleave(groups, 1), mask, rule)

    block = f"blocks.{layer}"
    return {f"{block}.q": note("q"), f"{block}.k": note("k"), f"{block}.pattern": pattern}
