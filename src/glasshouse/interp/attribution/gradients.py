"""Gradients on activations alone: parameters are frozen, so their gradients are neither formed nor stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.metric import Metric
from glasshouse.interp.reading.gradients import frozen
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit


def leaf(x: Tensor) -> Tensor:
    """The same activation as the start of a graph."""
    return x.detach().requires_grad_(True)


def activation_gradients(
    model: GPT,
    tokens: Tensor,
    metric: Metric,
    rows: Tensor,
    sites: Sequence[str],
    edit: Mapping[str, Edit] | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The metric [n], the activations of ``sites``, and d(metric of a row) / d(its activations), by site.

    ``tokens`` int64 [n, pos]; ``rows`` int64 [n] are their numbers for the metric. The graph begins at the
    embedding, or where ``edit`` puts something that wants a gradient. Rows do not mix in a forward pass, so
    the gradient of the sum over rows holds each row's own. UsageError when the metric does not depend on the
    model's output.
    """
    edits: dict[str, Edit] = {"embed": leaf} if edit is None else dict(edit)
    with frozen(model), torch.enable_grad(), Taps(read=sites, edit=edits) as taps:
        values = metric(model(tokens, taps), rows)
        acts = {site: taps[site] for site in sites}
        if not values.requires_grad:
            raise UsageError("the metric does not depend on the logits; it has no gradient")
        wanted = torch.autograd.grad(values.sum(), list(acts.values()), allow_unused=True)
    grads = {
        site: torch.zeros_like(acts[site]) if g is None else g for site, g in zip(acts, wanted, strict=True)
    }
    return values.detach(), {site: x.detach() for site, x in acts.items()}, grads
