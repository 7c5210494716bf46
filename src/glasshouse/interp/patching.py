"""Activation patching: which activation, put back from another run, restores a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit


class Margin(Protocol):
    """A decision read from logits."""

    def margin(self, logits: Tensor) -> Tensor:
        """The decision [batch] of next-token logits [batch, vocab]."""
        ...


@dataclass(frozen=True)
class Patching:
    """Recovery of the read-out when one activation is put back: 0 nothing restored, 1 all of it.

    ``recovery`` [1 + layer, position]: first the embedding, then each layer's ``resid_post``.
    ``components`` maps ``blocks.2.attn.h1`` or ``blocks.2.mlp`` to the recovery when that component's output
    is put back at every position.
    """

    recovery: Tensor
    components: dict[str, float]
    clean: float
    moved: float


@torch.no_grad()
def patch_residuals(model: GPT, clean: Sequence[int], moved: Sequence[int], readout: Margin) -> Patching:
    """Patch the residual stream and every component from the ``clean`` run into the ``moved`` run.

    Both are token rows of equal length (UsageError otherwise), the same but for the inserted word.
    ``readout.margin(logits)`` [batch] is read at the last position. Interchange after Vig et al. (2020),
    Meng et al. (2022); sites are patched exactly, not by gradient.
    """
    if len(clean) != len(moved):
        raise UsageError(f"patching needs rows of equal length, got {len(clean)} and {len(moved)}")
    n, config = len(clean), model.config
    names = ["embed"]
    names += [f"blocks.{i}.{s}" for i in range(config.n_layer) for s in ("resid_post", "z", "mlp_out")]
    both = torch.tensor([list(clean), list(moved)])
    with Taps(read=names) as taps:
        margins = readout.margin(model.unembed(model.hidden(both, taps)[:, -1]))
    source = {name: taps[name][0] for name in names}
    base, gap = margins[1], margins[0] - margins[1]
    if gap.abs() < 1e-6:
        raise UsageError("the two runs give the same read-out; there is nothing to restore")

    rows = torch.tensor([list(moved)]).expand(n, n)
    stream = ["embed", *(f"blocks.{i}.resid_post" for i in range(config.n_layer))]
    restored = [_patched(model, rows, {site: _one_each(source[site])}, readout) for site in stream]
    recovery = (torch.stack(restored) - base) / gap
    components: dict[str, float] = {}
    for layer in range(config.n_layer):
        heads = source[f"blocks.{layer}.z"]  # [head, pos, d_head]
        edit = {f"blocks.{layer}.z": _one_each(heads)}
        found = (_patched(model, rows[:1].expand(len(heads), n), edit, readout) - base) / gap
        components |= {f"blocks.{layer}.attn.h{h}": float(found[h]) for h in range(len(heads))}
        put = {f"blocks.{layer}.mlp_out": _all_positions(source[f"blocks.{layer}.mlp_out"])}
        components[f"blocks.{layer}.mlp"] = float((_patched(model, rows[:1], put, readout)[0] - base) / gap)
    return Patching(recovery, components, float(margins[0]), float(margins[1]))


@torch.no_grad()
def patch_component(
    model: GPT, clean: Sequence[int], moved: Sequence[int], component: str, readout: Margin
) -> float:
    """Read-out of the ``moved`` run with one component's output put back from the ``clean`` run.

    ``component`` is a name as ``Patching.components`` has it. UsageError for rows of unequal length.
    """
    if len(clean) != len(moved):
        raise UsageError(f"patching needs rows of equal length, got {len(clean)} and {len(moved)}")
    block, _, part = component.partition(".attn.h")
    site = f"{block}.z" if part else f"{component.removesuffix('.mlp')}.mlp_out"
    with Taps(read=[site], stop_early=True) as taps:
        model.hidden(torch.tensor([list(clean)]), taps)
    source = taps[site][0]

    def put_head(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, int(part)] = source[int(part)]
        return x

    edit = put_head if part else _all_positions(source)
    return float(_patched(model, torch.tensor([list(moved)]), {site: edit}, readout)[0])


def _patched(model: GPT, rows: Tensor, edit: dict[str, Edit], readout: Margin) -> Tensor:
    with Taps(edit=edit) as taps:
        return readout.margin(model.unembed(model.hidden(rows, taps)[:, -1]))


def _one_each(source: Tensor) -> Edit:
    """Row i of the batch gets entry i of the source [entry, ...]: its i-th position, or its i-th head."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        at = torch.arange(x.shape[0])
        x[at, at] = source[at]
        return x

    return edit


def _all_positions(source: Tensor) -> Edit:
    return lambda x: source.expand_as(x).clone()
