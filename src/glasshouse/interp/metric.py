"""What a behaviour is, as a number for each row: the metrics that patching, attribution and circuits share.

A metric sees logits and the numbers of the data set's rows they belong to, so that batches can be cut anyhow.
Higher means more of the behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import UsageError


class Metric(Protocol):
    """A number for each row of a data set."""

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The behaviour [n] of ``logits`` [n, pos, vocab], which are those of data set rows ``rows`` [n]."""
        ...


def at_positions(logits: Tensor, at: Tensor) -> Tensor:
    """Logits [n, vocab] at position ``at`` [n] of each row of ``logits`` [n, pos, vocab]."""
    return logits[torch.arange(len(logits), device=logits.device), at.to(logits.device)]


@dataclass(frozen=True)
class LogitDifference:
    """Mean logit of the right tokens less that of the wrong ones, at one position of each row.

    ``right`` and ``wrong`` int64 [n] or [n, k]; ``at`` int64 [n].
    """

    right: Tensor
    wrong: Tensor
    at: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        here = at_positions(logits, self.at[rows])

        def mean(tokens: Tensor) -> Tensor:
            return here.gather(1, tokens[rows].reshape(len(rows), -1).to(here.device)).mean(1)

        return mean(self.right) - mean(self.wrong)


@dataclass(frozen=True)
class KLDivergence:
    """Minus KL(reference || model), in nats, at one position of each row: 0 is the same prediction.

    ``reference`` logits [n, vocab] (of the whole model on the clean rows); ``at`` int64 [n].
    """

    reference: Tensor
    at: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        here = at_positions(logits, self.at[rows]).log_softmax(-1)
        there = self.reference[rows].to(here.device).log_softmax(-1)
        return -F.kl_div(here, there, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Distance:
    """Minus the mean squared distance to ``reference`` outputs [n, pos, vocab]: 0 is the same output.

    For models whose output is not a distribution, such as compiled transformers.
    ``mask`` bool [n, pos] (None: all) says which positions count.
    """

    reference: Tensor
    mask: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        square = (logits - self.reference[rows].to(logits.device)).square().mean(-1)  # [n, pos]
        if self.mask is None:
            return -square.mean(1)
        chosen = self.mask[rows].to(square)
        return -(square * chosen).sum(1) / chosen.sum(1)


@dataclass(frozen=True)
class SomeRows:
    """A metric of a data set, for its rows ``numbers`` alone; knows the position it reads if that does."""

    whole: Metric
    numbers: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return self.whole(logits, self.numbers[rows])

    @property
    def at(self) -> Tensor:
        """The position read in each row; AttributeError for a metric that reads several."""
        at: Tensor = self.whole.at  # type: ignore[attr-defined]  # not all have one
        return at[self.numbers]


@dataclass(frozen=True)
class Contrast:
    """The data of every patching method: rows that show the behaviour, and their corrupted twins.

    ``clean`` and ``corrupt`` int64 [n, pos], row by row of one length, differing only where the behaviour
    is decided. UsageError when shapes differ or there is no row.
    """

    clean: Tensor
    corrupt: Tensor
    metric: Metric

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape or self.clean.ndim != 2 or not len(self.clean):
            shapes = f"{list(self.clean.shape)} and {list(self.corrupt.shape)}"
            raise UsageError(f"a contrast needs clean and corrupt rows [n, pos] of one shape; got {shapes}")

    def __len__(self) -> int:
        return len(self.clean)

    def rows(self, numbers: Tensor) -> Contrast:
        """The contrast of some rows, by number."""
        metric = SomeRows(self.metric, numbers)
        return replace(self, clean=self.clean[numbers], corrupt=self.corrupt[numbers], metric=metric)

    def halves(self) -> tuple[Contrast, Contrast]:
        """Even and odd rows: find on one, measure on the other."""
        numbers = torch.arange(len(self))
        return self.rows(numbers[::2]), self.rows(numbers[1::2])
