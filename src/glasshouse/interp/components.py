"""Heads and MLPs of one run put into another: how much of a decision each of them carries.

Components are named as circuits name them: head ``a{layer}.h{head}``, MLP ``m{layer}``. What a component
writes at every position is exchanged (Vig et al. 2020; Geiger et al. 2021), so an effect includes all that it
causes in later components.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.patching import Margin
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.taps import Edit

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
    wrong = next((i for i, (b, s) in enumerate(zip(base, source, strict=True)) if len(b) != len(s)), None)
    if wrong is not None:
        raise UsageError(
            f"row {wrong}: exchanging needs twins of one length, got {len(base[wrong])} and "
            f"{len(source[wrong])} tokens"
        )
    names = [f"blocks.{i}.{s}" for i in range(model.config.n_layer) for s in ("z", "mlp_out")]
    out = np.empty((2 + len(sets), len(base)))
    order = np.argsort([len(row) for row in base], kind="stable")
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        (rows, last), (others, _) = _padded([base[i] for i in chosen]), _padded([source[i] for i in chosen])
        with Taps(read=names) as taps:
            out[1, chosen] = _decided(model, others, last, readout, taps)
        source_acts = {name: taps[name] for name in names}
        out[0, chosen] = _decided(model, rows, last, readout, None)
        for k, members in enumerate(sets):
            edit = _edits(members, source_acts)
            with Taps(edit=edit) as taps:
                out[2 + k, chosen] = _decided(model, rows, last, readout, taps if edit else None)
    if not np.isfinite(out).all():
        raise VerificationError("a decision is NaN or infinite; nothing was measured")
    return out[0], out[1], out[2:]


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


def _edits(members: Collection[str], source: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Edits that give components their outputs in ``source``."""
    heads: dict[str, list[int]] = {}
    edits: dict[str, Edit] = {}
    for name in members:
        layer, _, head = name[1:].partition(".h")
        if head:
            heads.setdefault(f"blocks.{layer}.z", []).append(int(head))
        else:
            edits[f"blocks.{layer}.mlp_out"] = _whole(source[f"blocks.{layer}.mlp_out"])
    return edits | {site: _heads(source[site], numbers) for site, numbers in heads.items()}


def _whole(source: Tensor) -> Edit:
    return lambda x: source


def _heads(source: Tensor, numbers: list[int]) -> Edit:
    """Heads ``numbers`` of [n, head, pos, d_head] from ``source``."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, numbers] = source[:, numbers]
        return x

    return edit


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
