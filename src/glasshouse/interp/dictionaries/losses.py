"""The objective of every architecture: what is minimised, for the loop that trains everything else too.

All parts are in units of scaled activations and divided by the width of the output: the papers' objectives up
to one constant, so that neither the loss nor the gradient's norm depends on the width. Means are over
activations. For top-k architectures only the active features are visited (`sparse`); `plain_loss` is the same
objective written densely, which tests hold against it.

Shape legend: n activations, S features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.base.errors import DataError
from glasshouse.interp.dictionaries.auxiliary import auxiliary_error, fired_in, plain_auxiliary_error, track
from glasshouse.interp.dictionaries.config import TOP_K
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary, refuse_not_finite
from glasshouse.interp.dictionaries.jumprelu import jumprelu, step
from glasshouse.interp.dictionaries.sparse import Active, batch_top_k, decode_active, encode_active, top_k
from glasshouse.train.objective import Loss


@dataclass(frozen=True)
class _Found:
    """Squared errors [n] summed over the width, other parts (weighted scalars), and statistics."""

    error: Tensor
    others: dict[str, Tensor]
    fired: Tensor  # bool [S]
    n_active: Tensor  # scalar
    residual: Tensor  # [n, d_out], scaled
    threshold: Tensor | None = None  # smallest chosen value of a batch


def dictionary_loss(model: Dictionary, batch: ActivationBatch) -> Loss:
    """Mean squared error of ``batch`` and what its architecture adds, per output dimension.

    In training mode with gradients on, it also counts how long features have been silent and follows the
    inference threshold of batchtopk and matryoshka. Metrics: ``tokens`` (activations), ``l0``,
    ``variance_explained``, ``dead`` (share of features). Matrix products of the encoder run in autocast's
    precision; chosen features are then computed in full precision.

    Raises DataError for activations that are not finite, of another width, or without a transcoder's targets.
    """
    return _loss(model, batch, fast=True)


def plain_loss(model: Dictionary, batch: ActivationBatch) -> Loss:
    """`dictionary_loss`, dense throughout: the definition."""
    return _loss(model, batch, fast=False)


def _loss(model: Dictionary, batch: ActivationBatch, fast: bool) -> Loss:
    target = _target(model, batch)
    found = (_sparse if fast and model.config.architecture in TOP_K else _dense)(model, batch.x, target)
    width = model.config.out
    parts = {"reconstruction": found.error.mean() / width}
    parts |= {name: value / width for name, value in found.others.items()}
    dead = model.dead()
    if model.config.architecture in TOP_K and model.config.auxiliary_weight:
        aux = auxiliary_error if fast else plain_auxiliary_error
        parts["auxiliary"] = model.config.auxiliary_weight * aux(model, batch.x, found.residual, dead) / width
    total = torch.stack(list(parts.values())).sum()
    if not torch.isfinite(total.detach()):
        for x in (batch.x, batch.y):
            if x is not None:
                refuse_not_finite(x, batch.shards)
    if model.training and torch.is_grad_enabled():
        track(model, found.fired, len(batch.x), found.threshold)
    return Loss(total, parts, _metrics(found, target, dead))


def _target(model: Dictionary, batch: ActivationBatch) -> Tensor:
    """What the output is compared with, scaled [n, d_out]. Raises DataError when it does not fit."""
    config, source = model.config, f" from {', '.join(batch.shards)}" if batch.shards else ""
    if batch.x.ndim != 2 or not len(batch.x):
        raise DataError(f"activations{source} of shape {list(batch.x.shape)}: expected [n, {config.d_in}]")
    if not config.is_transcoder:
        if batch.y is not None:
            raise DataError("this dictionary reconstructs its input; a batch with targets needs d_out set")
        return batch.x.to(model.W_dec.dtype) * model.scale_out
    if batch.y is None or batch.y.shape != (len(batch.x), config.out):
        got = "none" if batch.y is None else list(batch.y.shape)
        raise DataError(f"a transcoder needs targets [{len(batch.x)}, {config.out}]{source}; got {got}")
    return batch.y.to(model.W_dec.dtype) * model.scale_out


def _metrics(found: _Found, target: Tensor, dead: Tensor) -> dict[str, float]:
    variance = (target - target.mean(0)).square().sum()
    numbers = torch.stack(
        [
            found.n_active / len(target),
            1 - found.error.detach().sum() / variance.clamp(min=1e-12),
            dead.float().mean(),
        ]
    )
    l0, explained, share = numbers.tolist()
    return {"tokens": float(len(target)), "l0": l0, "variance_explained": explained, "dead": share}


def _with_skip(model: Dictionary, x: Tensor, output: Tensor) -> Tensor:
    """``output`` [n, d_out], scaled, with the skip connection's part if there is one."""
    if not model.config.skip_connection:
        return output
    return output + model.skipped(x) * model.scale_out


# -- only what is active -----------------------------------------------------------------------------------


def _sparse(model: Dictionary, x: Tensor, target: Tensor) -> _Found:
    """topk, batchtopk and matryoshka."""
    config = model.config
    centred = model.centred(x)
    active = choose(model, centred)
    with torch.autocast(x.device.type, enabled=False):
        values = encode_active(centred, model.W_enc, model.b_enc, active).relu()
        output = _with_skip(model, x, model.b_dec.expand(len(x), -1))
        if config.architecture == "matryoshka":
            errors, low = [], 0
            for high in config.prefixes:
                inside, part = active.between(low, high)
                output = output + decode_active(values[inside], model.W_dec, part)
                errors.append((target - output).square().sum(1))
                low = high
            error = torch.stack(errors).mean(0)
        else:
            output = output + decode_active(values, model.W_dec, active)
            error = (target - output).square().sum(1)
    on = values.detach() > 0
    smallest = values.detach().masked_fill(~on, torch.inf).min() if config.architecture != "topk" else None
    return _Found(
        error, {}, fired_in(active.features[on], config.d_sae), on.sum(), (target - output).detach(), smallest
    )


@torch.no_grad()
def choose(model: Dictionary, centred: Tensor) -> Active:
    """The features that training keeps active in ``centred`` [n, d_in]: chosen in autocast's precision."""
    config, device = model.config, centred.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else centred.dtype
    with torch.autocast(device, enabled=False):
        pre = torch.addmm(model.b_enc.to(dtype), centred.to(dtype), model.W_enc.to(dtype))
    k = config.k or 1
    if config.architecture == "topk":
        return Active.of_top_k(top_k(pre, k)[1], config.d_sae)
    rows, features = batch_top_k(pre, k * len(centred))
    return Active.of(features, rows, len(centred), config.d_sae)


# -- densely -----------------------------------------------------------------------------------------------


def _dense(model: Dictionary, x: Tensor, target: Tensor) -> _Found:
    """Every architecture as its paper writes it."""
    config, others = model.config, {}
    pre = model.pre_activations(x)
    match config.architecture:
        case "topk" | "batchtopk" | "matryoshka":
            features = _largest(pre.relu(), config.k or 1, each=config.architecture == "topk")
        case "gated":
            magnitude = model.centred(x) @ (model.W_enc * model.r_mag.exp()) + model.b_mag
            features = magnitude.relu() * (pre > 0)
            others = _gated_parts(model, x, pre.relu(), target)
        case "jumprelu":
            features = jumprelu(pre, model.threshold, config.jumprelu_bandwidth)
            l0 = step(pre, model.threshold, config.jumprelu_bandwidth).sum(1).mean()
            others = {"sparsity": config.sparsity_weight * l0}
        case _:
            features = pre.relu()
            # Bricken et al. 2023 keep rows at norm 1; where they are free, the norm is part of the penalty.
            norms = 1.0 if config.normalize_decoder else model.W_dec.norm(dim=1)
            others = {"sparsity": config.sparsity_weight * (features * norms).sum(1).mean()}
    output = _with_skip(model, x, features @ model.W_dec + model.b_dec)
    error = (target - output).square().sum(1)
    if config.architecture == "matryoshka":
        outputs = [
            _with_skip(model, x, features[:, :m] @ model.W_dec[:m] + model.b_dec) for m in config.prefixes
        ]
        error = torch.stack([(target - o).square().sum(1) for o in outputs]).mean(0)
    on = features.detach() > 0
    by_batch = config.architecture in ("batchtopk", "matryoshka")
    smallest = features.detach()[on].min() if by_batch and on.any() else None
    return _Found(error, others, on.any(0), on.sum(), (target - output).detach(), smallest)


def _largest(features: Tensor, k: int, each: bool) -> Tensor:
    """[n, S] with the k largest of each row, or n k of the whole batch, and zero elsewhere."""
    flat = features if each else features.reshape(1, -1)
    found = flat.topk(k if each else k * len(features), dim=-1)
    return torch.zeros_like(flat).scatter(-1, found.indices, found.values).reshape(features.shape)


def _gated_parts(model: Dictionary, x: Tensor, gate: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The penalty on open gates, and the error of what they alone would reconstruct with a decoder that does
    not learn from it (Rajamanoharan et al. 2024a, eq. 8).
    """
    output = _with_skip(model, x, gate @ model.W_dec.detach() + model.b_dec.detach())
    return {
        "sparsity": model.config.sparsity_weight * gate.sum(1).mean(),
        "gate": (target - output).square().sum(1).mean(),
    }
