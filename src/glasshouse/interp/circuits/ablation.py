"""What a cut edge brings instead: the four ablations, and where their activations come from.

A circuit's numbers mean nothing without the ablation they were measured under (on one compiled program the
same method scores 0.2 or 1.0 by this choice alone), so its name stands in every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.rng import generator

Kind = Literal["corrupt", "zero", "mean", "resample"]


@dataclass(frozen=True)
class Ablation:
    """What a cut edge brings in place of its writer's output.

    | kind       | the writer's output ...                                                                |
    |------------|----------------------------------------------------------------------------------------|
    | `corrupt`  | on the row's corrupted twin (interchange; MIB's and ACDC's own choice)                  |
    | `zero`     | zero                                                                                   |
    | `mean`     | averaged over ``reference`` rows, position by position                                 |
    | `resample` | on another row of ``reference``, drawn by ``seed``                                     |

    ``reference`` int64 [rows, pos]: for the last two kinds; None: the clean and the corrupted rows together
    (mean), the clean rows (resample: never the row itself). ``over_positions`` averages the mean over
    positions too. UsageError for a kind that does not exist.
    """

    kind: Kind = "corrupt"
    reference: Tensor | None = None
    over_positions: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise UsageError(
                f"no ablation {self.kind!r}.{suggest(self.kind, get_args(Kind))} There are {known}"
            )

    def __str__(self) -> str:
        if self.kind == "mean" and self.over_positions:
            return "mean over positions"
        return f"resample, seed {self.seed}" if self.kind == "resample" else self.kind

    def partners(self, n: int) -> Tensor:
        """Whose activations each of n rows gets, int64 [n]: rows of ``reference``, or of the n themselves."""
        rng = generator("resample", self.seed)
        if self.reference is not None:
            return torch.from_numpy(rng.integers(len(self.reference), size=n))
        if n < 2:
            raise UsageError("resampling among the rows themselves needs at least two; give a reference")
        order = torch.from_numpy(rng.permutation(n))
        partner = torch.empty(n, dtype=torch.int64)
        partner[order] = order.roll(1)  # one cycle: nobody gets his own
        return partner


def ablation(given: Ablation | Kind) -> Ablation:
    """An ablation, or the one of that kind."""
    return given if isinstance(given, Ablation) else Ablation(given)
