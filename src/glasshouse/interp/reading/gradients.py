"""Gradients of a metric with respect to activations, with the parameters frozen.

Attribution needs no gradient of a weight. With parameters frozen the backward pass skips the products that
would make them, a third of the arithmetic of a training step, and no graph exists before the first site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.metric import Metric
from glasshouse.interp.reading.adapter import Readable
from glasshouse.interp.reading.fill import sites_of
from glasshouse.model import Taps
from glasshouse.model.taps import Edit


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; outside each asks as before, whatever happened."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked:
            p.requires_grad_(wanted)


@dataclass(frozen=True)
class Gradients:
    """``value`` [batch]: the metric of each row. ``acts``, ``grads``: site -> activation, and the gradient of
    its row's metric with respect to it, in the activation's shape; both detached.
    """

    value: Tensor
    acts: dict[str, Tensor]
    grads: dict[str, Tensor]


def gradients(
    model: Readable,
    tokens: Tensor,
    metric: Metric,
    sites: str | Sequence[str],
    *,
    rows: Tensor | None = None,
    edit: Mapping[str, Edit] | None = None,
) -> Gradients:
    """Gradients of ``metric`` at ``sites`` (names or patterns) on ``tokens`` int64 [batch, pos].

    ``rows`` int64 [batch]: the data set's row numbers that the metric is told (None: 0, 1, ...). ``edit`` is
    applied first, so the gradient is that of the edited computation. Rows of a batch do not influence each
    other. Works where gradients are switched off. UsageError when a metric is not [batch] or not finite, or
    does not depend on a site.
    """
    names = sites_of(model, sites)
    rooted: dict[str, Edit] = {**(edit or {}), **{name: _root for name in names}}
    for name in set(names) & set(edit or ()):
        rooted[name] = _then_root((edit or {})[name])
    numbers = torch.arange(len(tokens)) if rows is None else rows
    with torch.enable_grad(), frozen(model), Taps(read=names, edit=rooted) as taps:
        value = metric(model(tokens, taps), numbers)
        total = value.sum()
    if value.shape != tokens.shape[:1] or not bool(value.isfinite().all()):
        raise UsageError(
            f"a metric gives a finite number for each of {len(tokens)} rows; got {list(value.shape)}, "
            f"{int((~value.isfinite()).sum())} not finite"
        )
    if not total.requires_grad:
        raise UsageError(f"the metric does not depend on any of {names}")
    acts = [taps[name] for name in names]
    found = torch.autograd.grad(total, acts, allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        if gradient is None:
            raise UsageError(f"the metric does not depend on {name!r}: no gradient reaches it")
    grads = {name: g for name, g in zip(names, found, strict=True) if g is not None}
    return Gradients(value.detach(), {n: a.detach() for n, a in zip(names, acts, strict=True)}, grads)


def _root(x: Tensor) -> Tensor:
    """Begin a graph here, unless an earlier site has begun one."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _then_root(edit: Edit) -> Edit:
    return lambda x: _root(edit(x))
