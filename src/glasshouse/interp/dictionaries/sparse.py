"""Sparse codes: choosing active features, and products and gradients that visit only those.

Of 4,096 features 32 are active: apart from the choice itself, a training step need not touch the rest. Sums
over the features of an activation (decoding) and over the activations of a feature (gradients of weights) are
both sums of weighted rows, `torch.nn.functional.embedding_bag`; the second after sorting by feature.

Shape legend: n activations, S features, D width, m active places in all (n k where every one has k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows looked at to guess where the n k largest of a batch begin, and how much more than those to keep.
SAMPLED_ROWS, MARGIN = 64, 1.5
# Fewer groups make the first choice cheaper and the second dearer; measured at 4,096 features and k 32.
GROUPS_PER_K, LEAST_GROUP = 16, 4


@dataclass(frozen=True)
class Active:
    """Which features are active in which activation, in both orders. All int64.

    ``features`` [m] and ``rows`` [m] by row, row i from ``row_starts[i]``; ``order`` [m] sorts them by
    feature, feature j then from ``feature_starts[j]``.
    """

    features: Tensor
    rows: Tensor
    row_starts: Tensor
    order: Tensor
    feature_starts: Tensor

    @classmethod
    def of(cls, features: Tensor, rows: Tensor, n: int, n_features: int) -> Active:
        """From places [m] sorted by row."""
        # Features as small integers: sorting them is a third of the cost.
        small = features.to(torch.int16 if n_features <= 2**15 else torch.int32)
        return cls(
            features, rows, _starts(rows, n), small.sort(stable=True).indices, _starts(features, n_features)
        )

    @classmethod
    def of_top_k(cls, indices: Tensor, n_features: int) -> Active:
        """From feature numbers [n, k]."""
        n, k = indices.shape
        rows = torch.arange(n, device=indices.device).repeat_interleave(k)
        return cls.of(indices.flatten(), rows, n, n_features)

    def between(self, low: int, high: int) -> tuple[Tensor, Active]:
        """The places of features ``low`` <= j < ``high``: which of [m] they are (bool), and their code."""
        inside = (self.features >= low) & (self.features < high)
        n, n_features = len(self.row_starts), len(self.feature_starts)
        return inside, Active.of(self.features[inside], self.rows[inside], n, n_features)


def _starts(numbers: Tensor, n: int) -> Tensor:
    """Where each of 0..n-1 begins in sorted ``numbers`` [m], int64 [n]."""
    counts = torch.bincount(numbers, minlength=n)
    return counts.cumsum(0) - counts


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values [..., k] of [..., S] and their places int64, in no order. Among equal values
    any may be chosen, as in `torch.topk`.

    In wide rows the k largest lie in the k groups with the largest maxima, so only those are searched.
    """
    n_features = pre.shape[-1]
    groups = GROUPS_PER_K * k
    if n_features % groups or n_features < LEAST_GROUP * groups:
        found = pre.topk(k, dim=-1, sorted=False)
        return found.values, found.indices
    grouped = pre.unflatten(-1, (-1, groups))  # strided groups: their maxima are those of whole rows
    best = grouped.amax(-2).topk(k, dim=-1, sorted=False).indices
    inside = best.unsqueeze(-2).expand(*grouped.shape[:-1], k)
    found = grouped.gather(-1, inside).flatten(-2).topk(k, dim=-1, sorted=False)
    which = found.indices // k
    return found.values, which * groups + best.gather(-1, found.indices - which * k)


def batch_top_k(pre: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and features int64 [count], sorted by row, of the ``count`` largest values of ``pre`` [n, S].

    Exactly those of `torch.topk` over the flattened batch (up to ties), found among few candidates: a bound
    guessed from some rows keeps a little more than ``count``, and is lowered where it kept less.
    """
    n, n_features = pre.shape
    flat = pre.flatten()
    sample = pre[:: max(1, n // SAMPLED_ROWS)].flatten()
    share = MARGIN * count / flat.numel()
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < count:
        keep = int(share * sample.numel()) + 1
        if keep >= sample.numel():
            places = torch.arange(flat.numel(), device=pre.device)
        else:
            bound = sample.kthvalue(sample.numel() - keep).values
            places = (flat > bound).nonzero().squeeze(1)
        share *= 2
    chosen = places[flat[places].topk(count, sorted=False).indices].sort().values
    return chosen // n_features, chosen % n_features


def sparse_decode(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Sums [n, D] of ``rows`` [S, D] at ``indices`` [n, k], each times its value [n, k]."""
    return F.embedding_bag(indices, rows, per_sample_weights=values.to(rows.dtype), mode="sum")


def encode_active(centred: Tensor, w_enc: Tensor, b_enc: Tensor, active: Active) -> Tensor:
    """Pre-activations [m] at the active places of ``centred`` [n, D], in the weights' precision.

    ``w_enc`` [D, S], ``b_enc`` [S]. Gradients reach all three, through the active places only.
    """
    made: Tensor = _Encode.apply(centred, w_enc, b_enc, active)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


def decode_active(values: Tensor, w_dec: Tensor, active: Active) -> Tensor:
    """Sums [n, D] of rows of ``w_dec`` [S, D] at the active places, each times its value [m]."""
    made: Tensor = _Decode.apply(values, w_dec, active)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


def _row_sums(source: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """For each start, the sum of ``source[index]`` times ``weights`` up to the next start."""
    return F.embedding_bag(index, source, starts, per_sample_weights=weights, mode="sum")


def _by_activation(values: Tensor, source: Tensor, active: Active) -> Tensor:
    """[n, D]: over the active features of each activation, sums of ``source`` [S, D]."""
    return _row_sums(source, active.features, active.row_starts, values)


def _by_feature(values: Tensor, source: Tensor, active: Active) -> Tensor:
    """[S, D]: over the activations of each feature, sums of ``source`` [n, D]."""
    order = active.order
    return _row_sums(source, active.rows[order], active.feature_starts, values[order])


def _products(left: Tensor, right: Tensor, active: Active) -> Tensor:
    """[m]: products of ``left[row]`` [n, D] with ``right[feature]`` [S, D] at the active places.

    This is the gradient of `_by_activation` by its values, and torch has a kernel for it.
    """
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, active.features, active.row_starts, active.rows, 0, -1
    )
    return dots


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: Tensor, w_enc: Tensor, b_enc: Tensor, active: Active) -> Tensor:
        reads = w_enc.T.contiguous()  # [S, D]: one feature's weights side by side
        ctx.save_for_backward(centred, reads)
        ctx.active = active
        return _products(centred, reads, active) + b_enc[active.features]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, reads = ctx.saved_tensors
        grad, active = grads[0].contiguous(), ctx.active
        by_input = _by_activation(grad, reads, active) if ctx.needs_input_grad[0] else None
        by_weight = _by_feature(grad, centred, active).T.contiguous()
        by_bias = torch.zeros_like(reads[:, 0]).index_add_(0, active.features, grad)
        return by_input, by_weight, by_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(values, w_dec)
        ctx.active = active
        return _by_activation(values, w_dec, active)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec = ctx.saved_tensors
        grad, active = grads[0].contiguous(), ctx.active
        return _products(grad, w_dec, active), _by_feature(values, grad, active), None
