"""Whether a reward model may be trained against: accuracy, reliability and log-loss on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from glasshouse.align.losses import bradley_terry
from glasshouse.align.preferences import Preference
from glasshouse.align.reward import Reward, rewards_of
from glasshouse.base.errors import DataError, TrainingError
from glasshouse.base.score import Score, rate


class RewardAtChance(TrainingError):
    """A reward model that is no better than a coin on held-out pairs: RL against it would be drift."""


@dataclass(frozen=True)
class Bin:
    """Pairs whose more likely answer had a probability in [``low``, ``high``): how sure the model was of it
    on average, and how often (by soft labels: how much) it was the better one.
    """

    low: float
    high: float
    n: int
    sure: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """``accuracy`` over pairs with a label other than 1/2, a tie counting as wrong; its interval counts
    prompts, since pairs of one prompt are not independent. ``ece``: mean gap of the bins, weighted by n.
    Log-losses in nats: ``chance`` knows nothing (log 2: which answer comes first says nothing), ``floor`` is
    the entropy of the soft labels themselves.
    """

    accuracy: Score
    ece: float
    bins: tuple[Bin, ...]
    log_loss: float
    chance: float
    floor: float
    n: int

    def rows(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def calibrate(reward: Reward, rows: Sequence[Preference], bins: int = 10) -> Calibration:
    """The report of ``reward`` on held-out ``rows``. DataError when no row prefers anything."""
    told = [row for row in rows if row.p != 0.5]
    if not told:
        raise DataError(
            "no held-out pair prefers one answer (every p is 0.5): there is nothing to measure on"
        )
    prompts = [list(row.prompt) for row in rows]
    chosen = rewards_of(reward(prompts, [list(row.chosen) for row in rows])).values.double()
    rejected = rewards_of(reward(prompts, [list(row.rejected) for row in rows])).values.double()
    p = torch.tensor([row.p for row in rows], dtype=torch.float64)
    gap = (chosen - rejected).cpu()
    right = [bool(g > 0) if q > 0.5 else bool(g < 0) for g, q in zip(gap, p, strict=True) if q != 0.5]
    prompts_n = len({row.key for row in told})
    accuracy = rate(round(sum(right) / len(right) * prompts_n), prompts_n)
    found = tuple(_bins(gap, p, bins))
    return Calibration(
        Score(sum(right) / len(right), accuracy.low, accuracy.high, prompts_n),
        sum(b.n * abs(b.sure - b.right) for b in found) / len(rows),
        found,
        float(bradley_terry(gap, torch.zeros_like(gap), p).mean()),
        math.log(2),
        float(F.binary_cross_entropy(p, p)),
        len(rows),
    )


def _bins(gap: torch.Tensor, p: torch.Tensor, n: int) -> list[Bin]:
    """Equal bins of [1/2, 1]: every pair is turned so that the model prefers its first answer."""
    sure = gap.abs().sigmoid()
    right = torch.where(gap < 0, 1 - p, p)
    which = ((sure - 0.5) * 2 * n).long().clamp(0, n - 1)
    made = []
    for i in range(n):
        here = which == i
        if bool(here.any()):
            low = 0.5 + i / (2 * n)
            means = float(sure[here].mean()), float(right[here].mean())
            made.append(Bin(low, low + 1 / (2 * n), int(here.sum()), *means))
    return made


def refuse_if_chance(report: Calibration) -> None:
    """Raise `RewardAtChance` unless accuracy on held-out pairs is above 1/2 with its whole interval."""
    if report.accuracy.low > 0.5:
        return
    raise RewardAtChance(
        f"the reward model's accuracy on held-out pairs is {report.accuracy}, which does not exclude "
        "a coin's 0.5: RL does not start. Make more preference rows, train the reward model longer, or look "
        "at the judge (does it always prefer the first answer?)"
    )
