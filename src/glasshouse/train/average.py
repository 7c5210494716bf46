"""Averaged weights: the mean of a stage's last weights takes the place of its very last ones.

Late iterates circle around a better point than any of them (Polyak & Juditsky 1992); for networks the mean of
the tail is averaging of checkpoints (Izmailov et al. 2018, SWA; Kaddour 2022, LAWA). Here every update of the
tail counts, equally. It costs one copy of the weights and one pass over them an update.

Which updates count is a function of the step, and the running mean is in the checkpoint beside the state of
the optimisers, so a resumed run ends in the same bits. Checkpoints within the stage hold the weights that
training goes on from; the stage's last checkpoint, which gates judge and people export, holds the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError

SUFFIX = "/average"  # of the names in optimizer.safetensors


class TailAverage:
    """The running mean of ``parameters`` over the last ``share`` of a stage's ``steps`` updates.

    Share 0 does nothing. Any positive share averages at least one update, which changes nothing either.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], steps: int, share: float):
        self._parameters = dict(parameters)
        self.steps = steps
        self.first = steps - math.ceil(share * steps)  # updates that do not count
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number ``step`` (from 1); after the last one, install the mean.

        Raises CheckpointError when the mean of earlier updates is missing: the run was resumed from a
        checkpoint that was written without it.
        """
        counted = step - self.first
        if counted < 1 or self.first == self.steps:
            return
        if counted == 1:
            self._mean = {name: p.detach().clone() for name, p in self._parameters.items()}
        elif not self._mean:
            raise CheckpointError(
                f"the mean of the weights after updates {self.first + 1} to {step - 1} is missing; "
                "resume with the recipe that wrote the checkpoint (average_share)"
            )
        else:
            torch._foreach_lerp_(
                list(self._mean.values()), [p.detach() for p in self._parameters.values()], 1.0 / counted
            )
        if step == self.steps:
            for name, p in self._parameters.items():
                p.copy_(self._mean[name])
            self._mean = {}

    def state_tensors(self) -> dict[str, Tensor]:
        """The mean so far as flat tensors named ``<parameter>/average``; empty outside the tail."""
        return {f"{name}{SUFFIX}": mean for name, mean in self._mean.items()}

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take the mean out of ``tensors``, if it is there. Raises CheckpointError for another model's."""
        found = {name: tensors.pop(name) for name in list(tensors) if name.endswith(SUFFIX)}
        if not found:
            self._mean = {}
            return
        for name, p in self._parameters.items():
            value = found.pop(f"{name}{SUFFIX}", None)
            if value is None or value.shape != p.shape:
                state = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise CheckpointError(
                    f"{where}: the averaged weight '{name}' is {state}; resume with the recipe that wrote it"
                )
            self._mean[name] = value.to(p.device, copy=True)
        if found:
            raise CheckpointError(f"{where}: an averaged weight for unknown parameter '{min(found)}'")
