"""What a dictionary keeps of a model's behaviour and activations, row by row of a text.

The dictionary's output takes the place of its site in the forward pass, and the cross-entropy is compared
with the model's own and with that of the site ablated: to zero, and to its mean over the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.dictionaries.stream import capture, device_of, named, read_from, shaped, unshaped
from glasshouse.model import Taps
from glasshouse.model.digest import weights_digest

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Spliced:
    """Sums for every row of a text, float64 [n]: from these every score and its interval follow.

    ``nats``: cross-entropy of "model", "reconstruction", "zero", "mean"; ``targets`` they are sums over.
    ``missed`` and ``spread``: squared distance of activations to their reconstruction and to their mean;
    ``active`` features, over ``positions``. ``fired`` int64 [d_sae]: positions at which a feature was active.
    """

    nats: dict[str, np.ndarray]
    targets: np.ndarray
    missed: np.ndarray
    spread: np.ndarray
    active: np.ndarray
    positions: np.ndarray
    fired: np.ndarray


def check_fits(dictionary: Dictionary, model: Any) -> tuple[str, str]:
    """The sites that ``dictionary`` reads and writes. UsageError when it is not this model's."""
    config = dictionary.config
    if not config.site:
        raise UsageError("the dictionary does not say which site it reads: set DictionaryConfig.site")
    if config.model_digest and config.model_digest != weights_digest(model):
        raise UsageError(
            f"the dictionary of {config.site} was trained on another model (weights "
            f"{config.model_digest[:12]}..., not {weights_digest(model)[:12]}...): load that model, or train "
            "a dictionary for this one"
        )
    read_from(model, config.site)
    written = named(model, config.site_out or config.site)
    if written not in model.sites():
        raise UsageError(f"nothing can be written at {written!r}: model.sites() lists what can")
    return config.site, written


def splicing(dictionary: Dictionary, model: Any, change: Callable[[Tensor], Tensor]) -> Taps:
    """Taps in which ``change`` ([batch, pos, d_in] read -> [batch, pos, d_out] written) replaces the site."""
    reads, writes = check_fits(dictionary, model)
    real = read_from(model, reads)
    if real == writes:
        return Taps(edit={writes: lambda x: unshaped(change(shaped(model, reads, x)), x)})
    held: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        held[:] = [x]
        return x

    def write(x: Tensor) -> Tensor:
        if not held:
            raise UsageError(f"the dictionary reads {reads}, which is computed after {writes}, its output")
        return unshaped(change(shaped(model, reads, held.pop())), x)

    return Taps(edit={real: remember, writes: write})


@torch.no_grad()
def spliced(model: Any, tokens: Tensor, dictionary: Dictionary, *, valid: Tensor | None = None) -> Spliced:
    """Run ``tokens`` int64 [n, pos] with the dictionary in its place and without it.

    ``valid`` bool [n, pos]: positions that count, as targets and as activations; None: all. At others the
    model keeps its own activation. UsageError for another model's dictionary, VerificationError when nothing
    counts or an activation is not finite.
    """
    reads, writes = check_fits(dictionary, model)
    counts = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
    if counts.shape != tokens.shape or not counts[:, 1:].any():
        raise VerificationError("no position of the text counts; a dictionary cannot be judged on nothing")
    mean = _mean(model, tokens, counts, writes)
    parts = [
        _rows(model, t, c, dictionary, (reads, writes), mean)
        for t, c in zip(tokens.split(ROWS_AT_ONCE), counts.split(ROWS_AT_ONCE), strict=True)
    ]

    def joined(of: Callable[[Spliced], np.ndarray]) -> np.ndarray:
        return np.concatenate([of(part) for part in parts])

    found = Spliced(
        {name: np.concatenate([part.nats[name] for part in parts]) for name in parts[0].nats},
        joined(lambda p: p.targets),
        joined(lambda p: p.missed),
        joined(lambda p: p.spread),
        joined(lambda p: p.active),
        joined(lambda p: p.positions),
        np.sum([part.fired for part in parts], axis=0),
    )
    if not all(np.isfinite(x).all() for x in (*found.nats.values(), found.missed, found.spread)):
        raise VerificationError(f"activations at {reads} or logits are not finite; nothing can be concluded")
    return found


def _mean(model: Any, tokens: Tensor, counts: Tensor, site: str) -> Tensor:
    """The mean activation [width] at the positions that count, in float64."""
    total, n = torch.zeros(()), 0
    for t, c in zip(tokens.split(ROWS_AT_ONCE), counts.split(ROWS_AT_ONCE), strict=True):
        here = capture(model, t.to(device_of(model)), [site])[site][c.to(device_of(model))]
        total, n = total.to(here.device) + here.double().sum(0), n + len(here)
    return total / n


def _instead(output: Tensor, _: Tensor) -> Tensor:
    """``output``, whatever was written."""
    return output


def _rows(
    model: Any, tokens: Tensor, counts: Tensor, dictionary: Dictionary, sites: tuple[str, str], mean: Tensor
) -> Spliced:
    device = device_of(model)
    tokens, counts = tokens.to(device), counts.to(device)
    acts = capture(model, tokens, sites)
    x, y = acts[sites[0]], acts[sites[1]]
    features = dictionary.encode(x)
    made = dictionary(x)
    kept = counts[..., None]
    outputs = {
        "reconstruction": torch.where(kept, made, y),
        "zero": torch.where(kept, torch.zeros_like(y), y),
        "mean": torch.where(kept, mean.to(y.dtype), y),
    }
    nats = {"model": _nats(model(tokens), tokens, counts)}
    for name, output in outputs.items():
        with splicing(dictionary, model, partial(_instead, output)) as taps:
            nats[name] = _nats(model(tokens, taps), tokens, counts)
    fired = (features != 0) & kept
    missed = ((y - made).double().square().sum(-1) * counts).sum(1)
    spread = ((y.double() - mean).square().sum(-1) * counts).sum(1)
    numbers = (counts[:, 1:].sum(1), missed, spread, fired.sum((1, 2)), counts.sum(1))
    targets, missed_, spread_, active, positions = (v.double().cpu().numpy() for v in numbers)
    return Spliced(nats, targets, missed_, spread_, active, positions, fired.sum((0, 1)).cpu().numpy())


def _nats(logits: Tensor, tokens: Tensor, counts: Tensor) -> np.ndarray:
    """Summed cross-entropy [n] of each row's next tokens, where they count."""
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weighed = each.view(tokens.shape[0], -1).double() * counts[:, 1:]
    found: np.ndarray = weighed.sum(1).cpu().numpy()
    return found
