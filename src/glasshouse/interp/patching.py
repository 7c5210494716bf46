"""Activation patching: which activation, put back from another run, restores a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution.places import Place
from glasshouse.interp.attribution.rerun import in_turn, put_edits, read
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
    source = {name: taps[name][:1] for name in names}
    base, gap = margins[1], margins[0] - margins[1]
    if gap.abs() < 1e-6:
        raise UsageError("the two runs give the same read-out; there is nothing to restore")

    row = torch.tensor([list(moved)])

    def restored(places: Sequence[Place]) -> Tensor:
        """Recovery [place], each place in a row of its own."""
        edits = put_edits(in_turn(places, 1), source)
        return (_decided(model, row.expand(len(places), n), edits, readout) - base) / gap

    stream = ["embed", *(f"blocks.{i}.resid_post" for i in range(config.n_layer))]
    recovery = torch.stack([restored([Place(site, None, at) for at in range(n)]) for site in stream])
    components: dict[str, float] = {}
    for layer in range(config.n_layer):
        heads = restored([Place(f"blocks.{layer}.z", h) for h in range(config.n_head)])
        components |= {f"blocks.{layer}.attn.h{h}": float(value) for h, value in enumerate(heads)}
        components[f"blocks.{layer}.mlp"] = float(restored([Place(f"blocks.{layer}.mlp_out")])[0])
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
    block, _, head = component.partition(".attn.h")
    place = Place(f"{block}.z", int(head)) if head else Place(f"{block.removesuffix('.mlp')}.mlp_out")
    source = read(model, torch.tensor([list(clean)]), [place.site])
    edits = put_edits(in_turn([place], 1), source)
    return float(_decided(model, torch.tensor([list(moved)]), edits, readout)[0])


def _decided(model: GPT, rows: Tensor, edits: dict[str, Edit], readout: Margin) -> Tensor:
    """The read-out [batch] of an edited run."""
    with Taps(edit=edits) as taps:
        return readout.margin(model.unembed(model.hidden(rows, taps)[:, -1]))
