"""Heads and MLPs of one run put into another: how much of a decision each of them carries.

Components are named as circuits name them: head ``a{layer}.h{head}``, MLP ``m{layer}``. What a component
writes at every position is exchanged (Vig et al. 2020; Geiger et al. 2021), so an effect includes all that it
causes in later components.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.attribution.places import node
from glasshouse.interp.attribution.rerun import put_edits
from glasshouse.interp.patching import Margin
from glasshouse.model import GPT, GPTConfig, Taps

Floats = NDArray[np.float64]
Rows = Sequence[Sequence[int]]
BATCH = 64  # rows in one forward pass
NAME = re.compile(r"(a(\d+|\*)\.h(\d+|\*)|m(\d+|\*))")


@dataclass(frozen=True)
class Share:
    """The share of a change of decision that a set of components makes: 0 none of it, 1 all.

    ``error`` is the standard error over rows.
    """

    value: float
    error: float

    def between(self, z: float) -> tuple[float, float]:
        """The interval of ``z`` standard errors."""
        return self.value - z * self.error, self.value + z * self.error


def component_names(config: GPTConfig) -> tuple[str, ...]:
    """Every head and MLP, in the order of computation."""
    heads = [[f"a{i}.h{h}" for h in range(config.n_head)] for i in range(config.n_layer)]
    return tuple(name for i, layer in enumerate(heads) for name in (*layer, f"m{i}"))


def matching(patterns: Collection[str], config: GPTConfig) -> tuple[str, ...]:
    """The components that patterns such as ``a1.h0``, ``a0.h*`` and ``m*`` name.

    UsageError for a pattern of another form or one that names none in this model.
    """
    every = component_names(config)
    for pattern in patterns:
        if not NAME.fullmatch(pattern):
            raise UsageError(f"{pattern!r} is no component: write a1.h0, a0.h*, m2 or m*")
        if not any(fnmatchcase(name, pattern) for name in every):
            raise UsageError(f"this model has no component {pattern!r}; it has {every[0]} to {every[-1]}")
    return tuple(name for name in every if any(fnmatchcase(name, p) for p in patterns))


@torch.no_grad()
def exchanged(
    model: GPT, base: Rows, source: Rows, readout: Margin, sets: Sequence[Collection[str]]
) -> tuple[Floats, Floats, Floats]:
    """Decisions of ``base`` [n], of ``source`` [n], and of base with each set's components from source.

    The third is [sets, n]. Rows are token ids, base and source row by row of one length; the decision is read
    at the last token. UsageError when lengths differ; VerificationError when a decision is not finite.
    """
    names = [f"blocks.{i}.{s}" for i in range(model.config.n_layer) for s in ("z", "mlp_out")]
    out = np.empty((2 + len(sets), len(base)))
    for chosen, rows, others, last in _beside(base, source):
        with Taps(read=names) as taps:
            out[1, chosen] = _decided(model, others, last, readout, taps)
        source_acts = {name: taps[name] for name in names}
        out[0, chosen] = _decided(model, rows, last, readout, None)
        for k, members in enumerate(sets):
            edits = put_edits([(slice(None), node(name, model)) for name in members], source_acts)
            with Taps(edit=edits) as taps:
                out[2 + k, chosen] = _decided(model, rows, last, readout, taps if edits else None)
    return _finite(out)[0], out[1], out[2:]


@torch.no_grad()
def exchanged_along(
    model: GPT, base: Rows, source: Rows, readout: Margin, site: str, direction: Tensor
) -> tuple[Floats, Floats, Floats]:
    """Decisions [n] of ``base``, of ``source``, and of base with its component along the unit ``direction``
    [width] at ``site`` ([batch, pos, width]) from source, at every position. Errors as `exchanged`.
    """
    out = np.empty((3, len(base)))
    along = direction.to(model.device)
    for chosen, rows, others, last in _beside(base, source):
        with Taps(read=[site]) as taps:
            out[1, chosen] = _decided(model, others, last, readout, taps)
        level = taps[site].float() @ along

        def put(x: Tensor, level: Tensor = level) -> Tensor:
            missing = level - x.float() @ along
            return (x.float() + missing.unsqueeze(-1) * along).to(x.dtype)

        out[0, chosen] = _decided(model, rows, last, readout, None)
        with Taps(edit={site: put}) as taps:
            out[2, chosen] = _decided(model, rows, last, readout, taps)
    return _finite(out)[0], out[1], out[2]


def _beside(base: Rows, source: Rows) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor, Tensor]]:
    """Twins by length, a batch at a time: their numbers, both sides' tokens [n, pos], each one's last place
    [n]. UsageError when lengths differ.
    """
    wrong = next((i for i, (b, s) in enumerate(zip(base, source, strict=True)) if len(b) != len(s)), None)
    if wrong is not None:
        raise UsageError(
            f"row {wrong}: exchanging needs twins of one length, got {len(base[wrong])} and "
            f"{len(source[wrong])} tokens"
        )
    order = np.argsort([len(row) for row in base], kind="stable")
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        (rows, last), (others, _) = _padded([base[i] for i in chosen]), _padded([source[i] for i in chosen])
        yield chosen, rows, others, last


def _finite(out: Floats) -> Floats:
    """Decisions as they are. VerificationError when one is not finite."""
    if not np.isfinite(out).all():
        raise VerificationError("a decision is NaN or infinite; nothing was measured")
    return out


def _padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Tokens [n, pos] padded on the right, which a causal model never sees, and each row's last place [n]."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return tokens, torch.tensor([len(row) - 1 for row in rows])


def _decided(model: GPT, tokens: Tensor, last: Tensor, readout: Margin, taps: Taps | None) -> Floats:
    hidden = model.hidden(tokens.to(model.device), taps)
    at = hidden[torch.arange(len(tokens), device=hidden.device), last.to(hidden.device)]
    found: Floats = readout.margin(model.unembed(at)).double().cpu().numpy()
    return found


def share(base: Floats, source: Floats, mixed: Floats) -> Share:
    """Least-squares share of the change from ``base`` to ``source`` [n] that ``mixed`` [n] makes.

    VerificationError when base and source decide alike: there is nothing to share.
    """
    whole, moved = source - base, mixed - base
    size = float(whole @ whole)
    if size < 1e-12 * max(1.0, float(base @ base)):
        raise VerificationError("the two runs decide alike; there is no effect whose share could be told")
    value = float(moved @ whole) / size
    left = whole * (moved - value * whole)
    return Share(value, float(np.sqrt(left @ left)) / size)


def propose(model: GPT, base: Rows, source: Rows, readout: Margin, most: float = 0.1) -> tuple[str, ...]:
    """The components that alone make more than ``most`` of the change either way: an allow-list to declare.

    For authors of constraints, on a model that is trusted and on prompts of their own; a constraint does not
    find its own list.
    """
    every = component_names(model.config)
    sets = [(name,) for name in every]
    ways = [exchanged(model, *pair, readout, sets) for pair in ((base, source), (source, base))]
    largest = [
        max(abs(share(here, there, mixed[k]).value) for here, there, mixed in ways) for k in range(len(every))
    ]
    return tuple(name for name, value in zip(every, largest, strict=True) if value > most)
