"""What a feature page shows, measured: where a feature fires, how often, and which tokens it writes for.

Two passes over the token rows for any number of features at once: one finds each feature's largest values and
the rows that hold them, the other, knowing the range, counts the histogram and keeps those rows' values. So
memory is ``features * top * pos`` numbers whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.dictionaries.stream import capture
from glasshouse.interp.formats.hooks import SITE
from glasshouse.model import GPT
from glasshouse.model.norm import RMSNorm

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class Coder(Protocol):
    """A dictionary, as far as pages need one."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter

    def encode(self, x: Tensor) -> Tensor:
        """Feature values [..., d_sae], none negative, of activations [..., d_in]."""
        ...


@dataclass(frozen=True)
class Context:
    """A row of tokens with one feature's value at each position."""

    row: int
    tokens: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width, and the bins' middles."""

    heights: tuple[float, ...]
    middles: tuple[float, ...]


@dataclass(frozen=True)
class Page:
    """One feature: its share of positions where it is not zero, its largest value, histogram and contexts.

    ``positive`` and ``negative``: (token, effect on its logit) of the decoder's direction, strongest first;
    empty where the dictionary does not write to the residual stream. ``n`` positions were looked at.
    """

    index: int
    direction: tuple[float, ...]
    n: int
    frac_nonzero: float
    max_value: float
    values: Histogram
    contexts: tuple[Context, ...]
    positive: tuple[tuple[int, float], ...]
    negative: tuple[tuple[int, float], ...]
    logits: Histogram


@dataclass(frozen=True)
class PageOptions:
    """``top`` contexts and ``n_logits`` tokens a page; ``bins`` of histograms; ``batch`` rows at a time."""

    top: int = 20
    n_logits: int = 10
    bins: int = 50
    batch: int = 32


@torch.no_grad()
def feature_pages(
    model: GPT,
    dictionary: Coder,
    rows: Tensor,
    site: str,
    features: Sequence[int],
    *,
    writes: str | None = None,
    options: PageOptions = PageOptions(),
) -> list[Page]:
    """Pages of ``features``, measured on token ``rows`` int64 [n, pos] at ``site``.

    ``writes``: the site that the dictionary's decoder writes to (None: ``site`` itself, not so for a
    transcoder). UsageError when there are no rows, a feature does not exist, or activations are not finite.
    """
    if rows.ndim != 2 or not rows.numel():
        raise UsageError(f"feature pages need token rows [n, pos], got shape {list(rows.shape)}")
    d_sae = len(dictionary.W_dec)
    wrong = [f for f in features if not 0 <= f < d_sae]
    if wrong or not features:
        raise UsageError(f"features {wrong or 'none'} asked for; this dictionary has 0..{d_sae - 1}")
    chosen = torch.tensor(list(features))

    def values() -> Iterator[tuple[int, Tensor]]:
        yield from _values(model, dictionary, rows, site, chosen, options.batch)

    count, peak, best = _extremes(values(), len(chosen), min(options.top, len(rows)))
    heights, contexts = _histograms(values(), rows, peak, best, options.bins)
    effects = logit_effects(model, dictionary.W_dec[chosen.to(dictionary.W_dec.device)], writes or site)
    n = rows.numel()
    return [
        Page(
            index=feature,
            direction=tuple(dictionary.W_dec[feature].float().tolist()),
            n=n,
            frac_nonzero=float(count[i]) / n,
            max_value=float(peak[i]),
            values=_bars(heights[i], 0.0, float(peak[i])),
            contexts=contexts[i],
            positive=_strongest(effects[i], options.n_logits) if effects is not None else (),
            negative=_strongest(-effects[i], options.n_logits, -1.0) if effects is not None else (),
            logits=_spread(effects[i], options.bins) if effects is not None else Histogram((), ()),
        )
        for i, feature in enumerate(features)
    ]


@torch.no_grad()
def logit_effects(model: GPT, directions: Tensor, writes: str) -> Tensor | None:
    """Direct effect [n, vocab] of ``directions`` [n, d] on the logits, each row less its mean.

    The final norm's gain is applied, and LayerNorm's centring, but not its division, which depends on the
    input: effects of one feature compare, those of different positions do not. None when ``writes`` is not
    the residual stream's basis.
    """
    found = SITE.fullmatch(writes)
    residual = found[2] in RESIDUAL if found else writes in ("embed", "final_norm")
    if not residual or directions.shape[-1] != model.config.d_model:
        return None
    x = directions.float().to(model.device)
    if writes != "final_norm":
        if isinstance(model.norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        gain = getattr(model.norm, "weight", None)
        if gain is not None:
            offset = 1.0 if isinstance(model.norm, RMSNorm) and model.norm.offset else 0.0
            x = x * (offset + gain.float())
    head = model.head_weight.float()
    # One at a time: a product's last bits depend on its size, and a page must not on the pages beside it.
    effects = torch.stack([head @ row for row in x])
    return (effects - effects.mean(-1, keepdim=True)).cpu()


def _values(
    model: GPT, dictionary: Coder, rows: Tensor, site: str, chosen: Tensor, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row's number, values [batch, pos, features]) over all rows."""
    for start in range(0, len(rows), batch):
        x = capture(model, rows[start : start + batch].to(model.device), [site])[site]
        if x.shape[-1] != len(dictionary.W_enc):
            raise UsageError(
                f"{site!r} is {x.shape[-1]} wide, the dictionary reads {len(dictionary.W_enc)}; "
                "was it fitted on another site or model?"
            )
        if not bool(torch.isfinite(x).all()):
            raise UsageError(f"activations at {site!r} are not finite, first in rows {start} and on")
        encoded = dictionary.encode(x.to(dictionary.W_dec))
        yield start, encoded[..., chosen.to(encoded.device)].float().cpu()


def _extremes(batches: Iterator[tuple[int, Tensor]], n: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Non-zero counts [n], largest values [n], and the rows [n, top] with the largest, strongest first.

    A row in which a feature is silent is -1. Of equal rows the earlier wins, so the batch size is no matter.
    """
    count, peaks = torch.zeros(n, dtype=torch.int64), torch.zeros(n, 0)
    where = torch.zeros(n, 0, dtype=torch.int64)
    for start, v in batches:
        count += (v > 0).sum((0, 1))
        peaks = torch.cat((peaks, v.amax(1).T), 1)
        numbers = torch.arange(start, start + len(v)).expand(n, -1)
        where = torch.cat((where, numbers), 1)
        order = peaks.argsort(dim=1, descending=True, stable=True)[:, :top]
        peaks, where = peaks.gather(1, order), where.gather(1, order)
    return count, peaks[:, 0], where.masked_fill(peaks <= 0, -1)


def _histograms(
    batches: Iterator[tuple[int, Tensor]], rows: Tensor, peak: Tensor, best: Tensor, bins: int
) -> tuple[Tensor, list[tuple[Context, ...]]]:
    """Counts [features, bins] of non-zero values from 0 to the peak, and the contexts of ``best`` rows."""
    n = len(peak)
    heights = torch.zeros(n, bins)
    kept: dict[tuple[int, int], Context] = {}
    for start, v in batches:
        flat = v.flatten(0, 1).T  # [features, positions]
        at = (flat / peak.clamp_min(1e-30)[:, None] * bins).long().clamp(0, bins - 1)
        heights.scatter_add_(1, at, (flat > 0).float())
        here = (best >= start) & (best < start + len(v))
        for i, j in here.nonzero().tolist():
            row = int(best[i, j])
            values = tuple(v[row - start, :, i].tolist())
            kept[i, j] = Context(row, tuple(rows[row].tolist()), values)
    top = best.shape[1]
    return heights, [tuple(kept[i, j] for j in range(top) if (i, j) in kept) for i in range(n)]


def _bars(heights: Tensor, low: float, high: float) -> Histogram:
    if high <= low:
        return Histogram((), ())
    step = (high - low) / len(heights)
    middles = tuple(low + (i + 0.5) * step for i in range(len(heights)))
    return Histogram(tuple(float(h) for h in heights.tolist()), middles)


def _strongest(effects: Tensor, k: int, sign: float = 1.0) -> tuple[tuple[int, float], ...]:
    """(token, effect times ``sign``) of the ``k`` largest; of equal ones the lower token first."""
    order = effects.argsort(descending=True, stable=True)[:k].tolist()
    return tuple((t, sign * float(effects[t])) for t in order)


def _spread(effects: Tensor, bins: int) -> Histogram:
    low, high = float(effects.min()), float(effects.max())
    if high <= low:
        return Histogram((), ())
    return _bars(torch.histc(effects, bins, low, high), low, high)
