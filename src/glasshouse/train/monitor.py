"""What goes on inside while a model trains: looked at every ``monitor_every`` steps, on a small slice of the
batch, through taps. Nothing here changes a bit of training.

| row's key            | per   | meaning                                                                  |
|----------------------|-------|--------------------------------------------------------------------------|
| ``resid_rms``        | layer | root mean square of ``resid_post``                                       |
| ``attn_entropy``     | layer | attention's entropy over that of attending evenly, mean over heads       |
| ``attn_entropy_min`` | layer | the same of the sharpest head: entropy collapse (Zhai et al. 2023)       |
| ``attn_logit_max``   | layer | largest attention logit: grows before divergence (Dehghani et al. 2023)  |
| ``dead_units``       | layer | share of MLP units below a thousandth of the layer's rms on every token  |
| ``update_ratio``     | layer | rms of the update over rms of the weights, matrices counting alike       |
| ``logit_max``        | model | largest output logit                                                     |
| ``log_z``            | model | rms log-normaliser of the softmax: what z-loss holds down                |
| ``noise_scale``      | model | rows a batch beyond which averaging pays little (McCandlish et al. 2018) |

``noise_scale`` is a ratio of two noisy estimates, ``noise_trace`` (tr of the gradient's covariance per row)
over ``noise_signal`` (squared norm of the true gradient), which rows carry for averaging over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glasshouse.model import GPT, Taps
from glasshouse.train.objective import Objective, TensorBatch, autocast
from glasshouse.train.step import plain, weighted_rows

SITES = ("resid_post", "q", "k", "pattern", "mlp_post")
TOKENS = 512  # looked at
POSITIONS = 256  # of a row: patterns grow with their square
UNEMBEDDED = 64  # tokens whose logits are formed: a vocabulary is wide
SMALL_SHARE = 4  # the gradient of one in so many rows is compared with that of all
SAMPLED = 2048  # weights of each matrix whose update is measured
DEAD = 1e-3


class Monitor:
    """One look: `before` the update, with its gradients in ``.grad``; `after` it. Returns a metrics row."""

    def __init__(self, model: GPT):
        self.model = model
        self.numbers: dict[str, Any] = {}
        self.weights: list[list[Tensor]] = []

    def before(
        self, objective: Objective, batch: TensorBatch, dtype: str, norm: float, accumulate: int = 1
    ) -> None:
        """Look at activations and gradient noise. ``norm``: of the whole batch's gradient, unclipped."""
        with plain(self.model):
            self.numbers |= activations(self.model, batch.tokens, dtype)
            self.numbers |= gradient_noise(self.model, objective, batch, dtype, norm, accumulate)
        self.weights = [[w.clone() for w in layer] for layer in sampled_weights(self.model)]

    def after(self) -> dict[str, Any]:
        """The row's numbers, update ratios included."""
        now = sampled_weights(self.model)
        self.numbers["update_ratio"] = [
            ratio(layer, was) for layer, was in zip(now, self.weights, strict=True)
        ]
        return self.numbers


@torch.no_grad()
def activations(model: GPT, tokens: Tensor, dtype: str) -> dict[str, Any]:
    """Activation norms, attention entropy and logits, dead units, output logits on a slice of ``tokens``."""
    seen = tokens[:, :POSITIONS]
    seen = seen[: max(1, TOKENS // seen.shape[1])]
    layers = range(model.config.n_layer)
    with autocast(dtype, model.device), Taps(read=[f"blocks.*.{site}" for site in SITES]) as taps:
        hidden = model.hidden(seen, taps)
        logits = model.unembed(hidden.flatten(0, 1)[-UNEMBEDDED:]).float()
    entropies = [attention_entropy(taps[f"blocks.{i}.pattern"]) for i in layers]
    sharpest = [attention_logit(model, taps, i) for i in layers]
    columns = {
        "resid_rms": [rms(taps[f"blocks.{i}.resid_post"]) for i in layers],
        "attn_entropy": [e.mean() for e in entropies],
        "attn_entropy_min": [e.min() for e in entropies],
        "attn_logit_max": sharpest,
        "dead_units": [dead_units(taps[f"blocks.{i}.mlp_post"]) for i in layers],
    }
    return {
        "tokens_seen": seen.numel(),
        **{name: torch.stack(values).tolist() for name, values in columns.items()},
        "logit_max": float(logits.abs().max()),
        "log_z": float(rms(logits.logsumexp(-1))),
    }


def rms(x: Tensor) -> Tensor:
    """Root mean square of all of ``x``, in fp32."""
    return x.float().square().mean().sqrt()


def attention_entropy(pattern_BHTS: Tensor) -> Tensor:
    """Entropy [head] of attention, as a share of what attending evenly to all visible positions would have.

    Queries that see one position only have nothing to choose and are left out.
    """
    p = pattern_BHTS.float()
    entropy_BHT = torch.special.entr(p).sum(-1)
    most_BHT = (p > 0).sum(-1).float().log()
    choice = most_BHT > 0
    share = torch.where(choice, entropy_BHT / most_BHT.clamp(min=1e-6), 0.0)
    return share.sum((0, 2)) / choice.sum((0, 2)).clamp(min=1)


def attention_logit(model: GPT, taps: Taps, layer: int) -> Tensor:
    """Largest absolute logit between a query and a key that it sees, before any soft cap."""
    q, k = taps[f"blocks.{layer}.q"].float(), taps[f"blocks.{layer}.k"].float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = getattr(model.config, "attn_scale", None) or q.shape[-1] ** -0.5
    logits = (q @ k.transpose(-1, -2)).abs() * scale
    return logits.masked_fill(taps[f"blocks.{layer}.pattern"] <= 0, 0.0).max()


def dead_units(post_BTF: Tensor) -> Tensor:
    """Share of MLP units whose output stays below `DEAD` times the layer's rms on every token."""
    size = post_BTF.float().abs()
    return (size.amax((0, 1)) <= DEAD * rms(post_BTF)).float().mean()


def gradient_noise(
    model: GPT, objective: Objective, batch: TensorBatch, dtype: str, norm: float, accumulate: int = 1
) -> dict[str, float]:
    """The simple noise scale, from the gradient of some rows and that of all: McCandlish et al. 2018 (arXiv
    1812.06162), appendix A.

    Both estimates are unbiased where rows are independent and weigh alike; rows without a target are left
    out. The small gradient takes no more rows than a micro-batch, whose memory is known to suffice. Empty
    when there are too few rows to compare.
    """
    chosen = weighted_rows(batch)
    n_big, n_small = len(chosen), len(chosen) // max(SMALL_SHARE, accumulate)
    if n_small < 1:
        return {}
    # One row in every so many, because neighbours may come from one document.
    at = chosen[:: n_big // n_small][:n_small]
    part = batch.take(at)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with autocast(dtype, model.device):
        loss = objective(model, part).total
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = torch._foreach_norm([g for g in gradients if g is not None])
    small, big = float(torch.stack([n.float() for n in norms]).square().sum()), norm**2
    signal = (n_big * big - n_small * small) / (n_big - n_small)
    trace = (small - big) / (1.0 / n_small - 1.0 / n_big)
    scale = {"noise_scale": trace / signal} if signal > 0 and trace > 0 else {}
    return {"noise_signal": signal, "noise_trace": trace, **scale}


def sampled_weights(model: GPT) -> list[list[Tensor]]:
    """Per block, about `SAMPLED` weights of each matrix, evenly spread; views of the parameters."""
    layers: list[list[Tensor]] = []
    for block in model.blocks:
        matrices = [p.detach().flatten() for p in block.parameters() if p.ndim == 2]
        # An odd stride walks through all columns of a matrix whose width is even.
        layers.append([m[:: (m.numel() // SAMPLED) | 1] for m in matrices])
    return layers


def ratio(now: Sequence[Tensor], was: Sequence[Tensor]) -> float | None:
    """Rms of the change over rms of the weights; None where there was no weight."""
    changed = sum(float((a - b).float().square().mean()) for a, b in zip(now, was, strict=True))
    weight = sum(float(b.float().square().mean()) for b in was)
    return (changed / weight) ** 0.5 if weight > 0 else None
