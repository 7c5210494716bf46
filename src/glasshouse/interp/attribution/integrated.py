"""Token attribution: integrated gradients, gradient times input, and exact erasure.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365): the gradient averaged along the straight
line from a baseline, times the way gone. Completeness, their sum being what the metric changed by, holds in
the limit of many steps; how far it is from holding is part of every result.

Shape legend: n rows, T positions, m steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import esc
from glasshouse.interp.attribution.effects import describe
from glasshouse.interp.attribution.gradients import activation_gradients
from glasshouse.interp.attribution.places import HEADED, Place
from glasshouse.interp.attribution.rerun import (
    SEQUENCES,
    base_run,
    changed,
    check_rows,
    read,
    row_chunks,
)
from glasshouse.interp.metric import Metric
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit

Baseline = Literal["mean", "zero"] | Tensor


@dataclass(frozen=True)
class TokenAttribution:
    """What each position of each row contributed to a metric, in the metric's units.

    ``values`` float64 [n, T]; ``total`` [n]: the metric less what it is at the baseline. ``incomplete``: mean
    |sum of values - total| over mean |total|, with its interval over rows: 0 is complete.
    ``convergence``: the same for each number of steps tried. ``raw``: attributions of the site's own shape.
    """

    tokens: Tensor
    values: Tensor
    total: Tensor
    method: str
    metric: str
    incomplete: Score
    convergence: tuple[tuple[int, float], ...] = ()
    raw: Tensor | None = None
    words: Sequence[str] = field(default=())

    def scores(self) -> list[Score]:
        """The mean over rows at every position, with its interval."""
        return [bootstrap(self.values[:, t].numpy()) for t in range(self.values.shape[1])]

    def __str__(self) -> str:
        steps = "".join(f"; {m} steps: {e:.2g}" for m, e in self.convergence)
        about = f"{self.method}; {self.metric}; n = {len(self.tokens)} rows"
        return f"{about}; incomplete by {self.incomplete}{steps}"

    def _repr_html_(self) -> str:
        return str(
            Markup("<p>{}</p>").format(esc(str(self)))
            + Markup().join(self.line(i) for i in range(min(8, len(self.tokens))))
        )

    def line(self, row: int) -> Markup:
        """One row's tokens on a ground as strong as their attribution; blue where it is negative."""
        values = self.values[row]
        largest = max(float(values.abs().max()), 1e-12)
        spans = [
            Markup('<span title="{}" style="background:rgba({},{});padding:1px 2px">{}</span>').format(
                f"{v:+.3f}",
                "176,100,42" if v >= 0 else "74,95,165",
                f"{abs(v) / largest:.3f}",
                esc(self._word(row, t), 60),
            )
            for t, v in enumerate(values.tolist())
        ]
        return Markup('<p style="line-height:1.9">{}</p>').format(Markup(" ").join(spans))

    def _word(self, row: int, t: int) -> str:
        token = int(self.tokens[row, t])
        return str(self.words[token]) if token < len(self.words) else f"#{token}"


def integrated_gradients(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    *,
    site: str = "embed",
    baseline: Baseline = "mean",
    steps: int = 16,
    tolerance: float = 0.01,
    most_steps: int = 512,
    words: Sequence[str] = (),
    sequences: int = SEQUENCES,
) -> TokenAttribution:
    """Attribute ``metric`` on rows int64 [n, pos] to the activations of ``site``, summed by position.

    ``baseline``: "mean" of the site over rows and positions, "zero", or other rows int64 [n, pos] whose
    activations it is (a contrast's corrupt rows). Points along the line are Gauss-Legendre's; from ``steps``
    their number doubles until completeness holds within ``tolerance`` (relative), or ``most_steps``; nothing
    is raised then, ``incomplete`` says it. A zero baseline before RMSNorm needs many: the norm turns sharply
    there. UsageError for an unknown site, or a baseline that gives the same metric.
    """
    tokens = check_rows(model, tokens)
    start, about = _baseline(model, tokens, site, baseline)
    here = read(model, tokens, [site])[site]
    with torch.no_grad():
        total = _gap(model, tokens, metric, site, start, sequences)
    if not torch.isfinite(total).all() or float(total.abs().mean()) < 1e-6:
        raise UsageError(f"{describe(metric)} is the same at the baseline ({about}); choose another baseline")
    convergence: list[tuple[int, float]] = []
    while True:
        raw = (here - start) * _mean_gradient(model, tokens, metric, site, start, here, steps, sequences)
        values = _by_position(raw, site)
        convergence.append((steps, float((values.sum(1) - total).abs().mean() / total.abs().mean())))
        if convergence[-1][1] <= tolerance or 2 * steps > most_steps:
            break
        steps *= 2
    method = f"integrated gradients at {site}, baseline {about}, {steps} steps"
    return _result(tokens, values, total, method, metric, words, tuple(convergence), raw)


def gradient_times_input(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    *,
    site: str = "embed",
    baseline: Baseline = "mean",
    words: Sequence[str] = (),
    sequences: int = SEQUENCES,
) -> TokenAttribution:
    """One gradient, at the rows themselves, times the way from the baseline; arguments as above."""
    tokens = check_rows(model, tokens)
    start, about = _baseline(model, tokens, site, baseline)
    found = []
    for rows in row_chunks(len(tokens), sequences):
        _, acts, grads = activation_gradients(model, tokens[rows], metric, rows, [site])
        found.append((acts[site] - start[rows]) * grads[site])
    raw = torch.cat(found)
    with torch.no_grad():
        total = _gap(model, tokens, metric, site, start, sequences)
    method = f"gradient times input at {site}, baseline {about}"
    return _result(tokens, _by_position(raw, site), total, method, metric, words, (), raw)


@torch.no_grad()
def erasure(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    *,
    site: str = "embed",
    baseline: Baseline = "mean",
    words: Sequence[str] = (),
    sequences: int = SEQUENCES,
) -> TokenAttribution:
    """What the metric loses when one position at a time is put at the baseline: exact, one run each.

    Positions that do the same work each lose nothing, so these need not add up; ``incomplete`` says by how
    much they do not.
    """
    tokens = check_rows(model, tokens)
    start, about = _baseline(model, tokens, site, baseline)
    places = [Place(site, None, t) for t in range(tokens.shape[1])]
    lost = []
    for rows in row_chunks(len(tokens), sequences):
        base = base_run(model, tokens[rows], metric, rows)
        lost.append(base.values - changed(model, base, metric, places, {site: start[rows]}, sequences))
    values = torch.cat(lost, 1).T.double()
    total = _gap(model, tokens, metric, site, start, sequences)
    return _result(
        tokens, values, total, f"erasure at {site}, baseline {about} (exact)", metric, words, (), None
    )


def _result(
    tokens: Tensor,
    values: Tensor,
    total: Tensor,
    method: str,
    metric: Metric,
    words: Sequence[str],
    convergence: tuple[tuple[int, float], ...],
    raw: Tensor | None,
) -> TokenAttribution:
    values, total = values.cpu(), total.double().cpu()
    if not torch.isfinite(values).all():
        raise UsageError(f"{method}: attributions are not finite; look for NaN in the model's weights")
    left, whole = (values.sum(1) - total).abs().numpy(), total.abs().numpy()

    def share(rows: np.ndarray) -> float:
        at = rows.astype(int)
        return float(left[at].mean() / max(whole[at].mean(), 1e-12))

    n = len(left)
    if n < 3:  # as `bootstrap` has it: the rows' own range
        each = left / np.maximum(whole, 1e-12)
        incomplete = Score(share(np.arange(n)), float(each.min()), float(each.max()), n)
    else:
        incomplete = bootstrap(np.arange(n), share)
    return TokenAttribution(
        tokens.cpu(), values, total, method, describe(metric), incomplete, convergence, raw, words
    )


def _baseline(model: GPT, tokens: Tensor, site: str, baseline: Baseline) -> tuple[Tensor, str]:
    """The baseline's activations [n, ...] and what to call them."""
    if site not in model.sites():
        raise UsageError(f"no site {site!r} in this model.{suggest(site, model.sites())}")
    if isinstance(baseline, Tensor):
        if baseline.shape != tokens.shape:
            raise UsageError(f"baseline rows are {list(baseline.shape)}, the rows {list(tokens.shape)}")
        return read(model, check_rows(model, baseline), [site])[site], "of other rows"
    here = read(model, tokens, [site])[site]
    if baseline == "zero":
        return torch.zeros_like(here), "zero"
    if baseline == "mean":
        axis = (0, 2) if site.rpartition(".")[2] in HEADED else (0, 1)
        return here.mean(axis, keepdim=True).expand_as(here).contiguous(), "mean"
    raise UsageError(f"baseline is 'mean', 'zero' or rows of tokens, not {baseline!r}")


def _by_position(raw: Tensor, site: str) -> Tensor:
    """Attributions summed over all but row and position, [n, T]."""
    if site.rpartition(".")[2] in HEADED:
        raw = raw.transpose(1, 2)
    return raw.double().flatten(2).sum(2)


@torch.no_grad()
def _gap(model: GPT, tokens: Tensor, metric: Metric, site: str, start: Tensor, sequences: int) -> Tensor:
    """The metric less what it is with ``site`` at the baseline, [n]."""
    found = []
    for rows in row_chunks(len(tokens), sequences):
        with Taps(edit={site: _given(start[rows])}) as taps:
            there = metric(model(tokens[rows], taps), rows)
        found.append(metric(model(tokens[rows]), rows).double() - there.double())
    return torch.cat(found)


def _given(value: Tensor) -> Edit:
    return lambda x: value


def _mean_gradient(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    site: str,
    start: Tensor,
    end: Tensor,
    steps: int,
    sequences: int,
) -> Tensor:
    """The gradient averaged along the line, of the activations' shape; points and rows share passes."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    at = torch.tensor((points + 1) / 2).to(end)
    weight = torch.tensor(weights / 2).to(end)
    total = torch.zeros_like(end)
    n = len(tokens)
    for numbers in torch.arange(steps * n).split(sequences):
        rows, step = numbers % n, numbers // n
        way = at[step].view(-1, *(1 for _ in end.shape[1:]))
        x = (start[rows] + way * (end[rows] - start[rows])).requires_grad_(True)
        _, _, grads = activation_gradients(model, tokens[rows], metric, rows, [site], {site: _given(x)})
        share = weight[step].view(-1, *(1 for _ in end.shape[1:]))
        total.index_add_(0, rows.to(end.device), grads[site] * share)
    return total
