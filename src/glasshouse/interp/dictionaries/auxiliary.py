"""Features that have stopped firing: who they are, a loss that brings them back, and drawing them anew.

Shape legend: n activations, S features, d dead features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.dictionaries.sparse import Active, decode_active, encode_active, top_k

# Bricken et al. 2023, "Neuron resampling": the encoder's new weights, in mean norms of living ones.
RESAMPLED_NORM = 0.2
# So many dead features for each that takes part are multiplied densely: products are faster than gathering.
DENSE_UP_TO = 6


def fired_in(features: Tensor, n_features: int) -> Tensor:
    """Bool [S]: which feature numbers occur in ``features`` int64 [m]."""
    fired = torch.zeros(n_features, dtype=torch.bool, device=features.device)
    fired[features] = True
    return fired


@torch.no_grad()
def track(model: Dictionary, fired: Tensor, n: int, threshold: Tensor | None) -> None:
    """Note which features ``fired`` bool [S] in a batch of ``n``, and its smallest chosen value.

    Both live in buffers, so a resumed run goes on counting. The inference threshold is a running mean of the
    batches' smallest (Bussmann et al. 2024, eq. 8); it starts at the first, not at zero.
    """
    model.since_fired.add_(n).masked_fill_(fired, 0)
    if threshold is not None:
        known = torch.isfinite(threshold)
        rate = torch.where(model.topk_threshold > 0, model.config.threshold_rate, 1.0)
        now = torch.where(known, threshold, model.topk_threshold)
        model.topk_threshold.lerp_(now, rate.to(now.dtype))


def auxiliary_error(model: Dictionary, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """AuxK (Gao et al. 2024, app. A.2): mean squared error [scalar, summed over the width] with which the
    ``aux_k`` largest dead features explain ``residual`` [n, d_out], what the living ones left over.

    Fewer dead features than ``aux_k`` count by their share, as sparsify does it. Gradients reach those
    features' own weights only. ``dead`` bool [S].
    """
    numbers = dead.nonzero().squeeze(1)
    if not len(numbers):
        return residual.new_zeros(())
    k = min(model.config.aux_k, len(numbers))
    centred = model.centred(x).detach()
    w_enc, b_enc = model.W_enc.index_select(1, numbers), model.b_enc.index_select(0, numbers)
    w_dec = model.W_dec.index_select(0, numbers)
    if len(numbers) <= DENSE_UP_TO * k:
        explained = _largest(centred @ w_enc + b_enc, k) @ w_dec
    else:
        with torch.no_grad():
            chosen = top_k(centred @ w_enc + b_enc, k)[1]
        active = Active.of_top_k(chosen, len(numbers))
        with torch.autocast(x.device.type, enabled=False):
            values = encode_active(centred, w_enc, b_enc, active).relu()
            explained = decode_active(values, w_dec, active)
    return (residual - explained).square().sum(1).mean() * min(1.0, len(numbers) / model.config.aux_k)


def _largest(pre: Tensor, k: int) -> Tensor:
    """[n, d] with the k largest of each row of ``pre`` where they are positive, and zero elsewhere."""
    if k == pre.shape[1]:
        return pre.relu()
    found = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter(1, found.indices, found.values.relu())


def plain_auxiliary_error(model: Dictionary, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """`auxiliary_error`, dense: the definition."""
    n_dead = int(dead.sum())
    if not n_dead:
        return residual.new_zeros(())
    k = min(model.config.aux_k, n_dead)
    pre = model.centred(x).detach() @ model.W_enc + model.b_enc
    features = _largest(pre.masked_fill(~dead, -torch.inf), k)
    error = (residual - features @ model.W_dec).square().sum(1).mean()
    return error * min(1.0, n_dead / model.config.aux_k)


@torch.no_grad()
def resample(
    model: Dictionary, x: Tensor, seed: int, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> int:
    """Point dead features at activations of ``x`` [n, d_in] that are badly reconstructed; return how many.

    Bricken et al. 2023, "Neuron resampling": activations are drawn with probability proportional to the
    square of their loss; the decoder's row becomes the activation (less ``b_dec``) at norm 1, the encoder's
    the same at a fifth of the living features' mean norm, its bias 0; Adam's moments of both start over.
    Autoencoders only. The same seed and weights draw the same rows.
    """
    numbers = model.dead().nonzero().squeeze(1)
    if not len(numbers) or model.config.is_transcoder:
        return 0
    error = (x - model(x)).square().sum(1).square()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(error.cpu().double(), len(numbers), replacement=True, generator=generator)
    towards = x[rows.to(x.device)] * model.scale_in - model.b_dec
    towards = towards / towards.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alive = ~model.dead()
    norm = model.W_enc.norm(dim=0)[alive].mean() if alive.any() else torch.ones((), device=x.device)
    model.W_dec[numbers] = towards
    model.W_enc[:, numbers] = (towards * norm * RESAMPLED_NORM).T
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if hasattr(model, name):
            getattr(model, name)[numbers] = 0.0
    if hasattr(model, "threshold"):
        model.threshold[numbers] = model.config.jumprelu_threshold
    model.since_fired[numbers] = 0
    for optimizer in optimizers:
        _forget(model, numbers, optimizer)
    return len(numbers)


def _forget(model: Dictionary, numbers: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Zero the moments of the features ``numbers`` in the optimiser's state of this dictionary."""
    for p in model.parameters():
        for moment in optimizer.state.get(p, {}).values():
            if not isinstance(moment, Tensor) or moment.shape != p.shape:
                continue
            if p is model.W_enc:
                moment[:, numbers] = 0.0
            elif len(p) == model.config.d_sae and p is not model.b_dec:
                moment[numbers] = 0.0
