"""Loss spikes, gradient spikes and values that are not finite: seen before the update that they would spoil.

A step's loss and gradient norms (the whole gradient's and every tensor's) are compared with those of the last
128 steps. A spike stands more than six standard deviations above what is usual (the rule of OLMo 2, Team OLMo
et al. 2024, "SkipStep"; PaLM, Chowdhery et al. 2022, sec. 5.1, restarted before spikes by hand).

What is usual is a level, the median of the last 32 steps, and the deviation is that of the steps from their
own levels: 1.4826 times the median absolute deviation. Not the mean and the standard deviation of the 128
steps, because a spike that is in the window hides the next one (after one gradient of 100 times the usual
size, six standard deviations are 54 times the usual size), and because the trend of a young run would count
as noise. Norms are compared as logarithms: they are spread by factors and grow by factors. Deviations have a
floor, so that a run whose loss hardly varies is not stopped for a trifle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError

WINDOW = 128  # steps that a step is compared with
LEVEL = 32  # of which the last so many say where the level is; a new level is accepted after half of them
LEAST = 32  # before so many there is nothing to compare with; a young run's loss and norms change anyway
SIGMAS = 6.0
LOSS_FLOOR = 0.05  # nats: less than 0.3 nats above the median are no spike
NORM_FLOOR = 0.25  # natural log: less than 4.5 times the median norm are no spike
# A single tensor's: when attention begins to find something, its gradients grow 20-fold within a few steps,
# and that is learning. Less than 67 times the median are no spike.
TENSOR_FLOOR = 0.7
NOT_FINITE_IN_A_ROW = 3  # this many skipped updates in a row end the run: no batch is to blame for all
REWIND_STEPS = 4  # batches that a rewind leaves out: the one that showed the spike and those just before it
TINY = 1e-30


@dataclass(frozen=True)
class Spike:
    """What was seen. ``limit`` is what the window allowed; a value that is not finite has no limit."""

    what: str  # "loss" | "gradient norm" | "gradient norm of <parameter>"
    value: float
    limit: float | None = None

    @property
    def finite(self) -> bool:
        """Whether the value is a number; if not, the update must never be applied."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if not self.finite:
            return f"{self.what} is {self.value}"
        return f"{self.what} is {self.value:.4g}, above {self.limit:.4g}"

    def record(self) -> dict[str, Any]:
        """As JSON, which has no word for NaN."""
        return {
            "what": self.what,
            "value": self.value if self.finite else str(self.value),
            "limit": self.limit,
        }


class Detector:
    """Compares each step with the last `WINDOW` steps. Its state is part of a checkpoint, so that a killed
    run sees the same spikes again.

    ``names``: the gradient tensors, in the order in which their norms are given. Every finite step enters the
    window, skipped or not: medians bear up to half of it being spikes, and a level that stays becomes usual.
    """

    def __init__(self, names: Sequence[str]):
        self.names = ("loss", "gradient norm", *(f"gradient norm of {name}" for name in names))
        self.floor = np.array([LOSS_FLOOR, NORM_FLOOR, *[TENSOR_FLOOR] * len(names)])
        self.forget()
        self.steps = 0  # looked at in this stage
        self.skipped: list[int] = []  # which of them, within the last WINDOW, were skipped
        self.in_a_row = 0  # skipped because not finite, without an update between

    def forget(self) -> None:
        """Empty the window: from here on the data are others, and so is what is usual."""
        self.values = np.zeros((len(self.names), WINDOW))
        self.apart = np.zeros((len(self.names), WINDOW))  # from their level
        self.filled = 0

    def look(self, loss: float, norms: Sequence[float]) -> Spike | None:
        """The worst that is out of the ordinary in this step, or None. ``norms``: one per gradient tensor."""
        self.steps += 1
        total = float(np.linalg.norm(norms))
        if not math.isfinite(loss):
            return Spike("loss", loss)
        if not math.isfinite(total):
            worst = next((i for i, x in enumerate(norms) if not math.isfinite(x)), None)
            return Spike(self.names[1] if worst is None else self.names[2 + worst], total)
        now = np.array([total, *norms])
        now = np.concatenate([[loss], np.log(np.maximum(now, TINY))])
        recent = (self.filled - 1 - np.arange(min(LEVEL, self.filled))) % WINDOW
        apart = now - median(self.values[:, recent]) if self.filled else np.zeros_like(now)
        spike = self._compare(now, apart) if self.filled >= LEAST else None
        self.values[:, self.filled % WINDOW], self.apart[:, self.filled % WINDOW] = now, apart
        self.filled += 1
        return spike

    def _compare(self, now: np.ndarray, apart: np.ndarray) -> Spike | None:
        past = self.apart[:, : self.filled]
        # Only what stands out from most of the window can be a spike; medians of all tensors at every step
        # would cost a percent of a small model's time.
        rare = np.flatnonzero((past >= apart[:, None]).sum(axis=1) <= past.shape[1] // 4)
        if rare.size == 0:
            return None
        past, floor = past[rare], self.floor[rare]
        middle = median(past)
        deviation = np.maximum(1.4826 * median(np.abs(past - middle[:, None])), floor)
        sigmas = (apart[rare] - middle) / deviation
        spikes = np.flatnonzero(sigmas > SIGMAS)
        if spikes.size == 0:
            return None
        # The loss says most, then the whole gradient, then the tensor that stands out most.
        at = spikes[0] if rare[spikes[0]] < 2 else spikes[np.argmax(sigmas[spikes])]
        column = rare[at]
        value = float(now[column])
        limit = value - float(apart[column] - middle[at] - SIGMAS * deviation[at])
        if column > 0:
            value, limit = math.exp(value), math.exp(limit)
        return Spike(self.names[column], value, limit)

    def skip(self, spike: Spike) -> None:
        """The update of the step just looked at is not applied."""
        self.skipped = [n for n in self.skipped if n > self.steps - WINDOW] + [self.steps]
        self.in_a_row = 0 if spike.finite else self.in_a_row + 1

    def applied(self) -> None:
        """The update of the step just looked at is applied."""
        self.in_a_row = 0

    def too_many(self, most: int) -> bool:
        """Whether more than ``most`` of the last `WINDOW` steps were skipped."""
        return sum(n > self.steps - WINDOW for n in self.skipped) > most

    def state(self) -> dict[str, Tensor]:
        """The state as tensors, for a checkpoint."""
        counts = [self.steps, self.filled, self.in_a_row]
        return {
            "values": torch.from_numpy(self.values.copy()),
            "apart": torch.from_numpy(self.apart.copy()),
            "counts": torch.tensor(counts, dtype=torch.int64),
            "skipped": torch.tensor(self.skipped, dtype=torch.int64),
        }

    def load(self, state: Mapping[str, Tensor], where: str) -> None:
        """Restore `state`. Raises CheckpointError if it is of another model."""
        expected = self.state()
        if {*state} != {*expected} or state["values"].shape != self.values.shape:
            raise CheckpointError(
                f"{where}: the window of past losses belongs to another model; "
                "resume with the recipe that wrote it"
            )
        self.values, self.apart = state["values"].numpy().copy(), state["apart"].numpy().copy()
        self.steps, self.filled, self.in_a_row = (int(n) for n in state["counts"])
        self.skipped = [int(n) for n in state["skipped"]]


def median(rows: np.ndarray) -> np.ndarray:
    """The upper median of each row: a value of it, without sorting all of them."""
    half = rows.shape[1] // 2
    return np.partition(rows, half, axis=1)[:, half]


def broken(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """The first parameter of ``model`` or entry of optimiser ``state`` that is not finite, or None."""
    for kind, tensors in (("parameter", dict(model.named_parameters())), ("optimiser state", state)):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{kind} {name}"
    return None
