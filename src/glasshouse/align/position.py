"""Whether a judge looks at the answers, or at where they stand.

Every pair is judged twice, once with each answer in the first place. A judge of answers changes its letter
when they change places; a judge of places does not, and averaging its two judgements leaves noise. A lean of
a few points on pairs that it finds equal does no harm, since both orders are averaged: what counts is how
much of its variance is the place's, and not in how many pairs it kept its letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.base.errors import Stopped
from glasshouse.base.score import Score, bootstrap

LIMIT = 0.6  # half of the variance of a judge of noise is the place's


class JudgeBiased(Stopped):
    """A judge chooses by position. Its rows are kept; none of its labels is used."""


class JudgeUnreadable(Stopped):
    """Most of a judge's answers could not be read. What could be is kept."""


@dataclass(frozen=True)
class PositionBias:
    """Of pairs judged in both orders: ``shift`` is the mean of P(A) over both orders, less 1/2; ``bound`` the
    share that places have in the variance of P(A) around 1/2, from 0 (answers alone) to 1 (places alone);
    ``letter`` the one that gains."""

    shift: Score
    bound: Score
    letter: str

    def binds(self, limit: float = LIMIT) -> bool:
        """Whether places are more than ``limit`` of what moves it, by the interval's lower end."""
        return self.bound.low > limit

    def __str__(self) -> str:
        return (
            f"the place makes {self.bound} of its variance, mostly to {self.letter}; "
            f"P(A) - 1/2 = {self.shift.value:+.3f} [{self.shift.low:+.3f}, {self.shift.high:+.3f}]"
        )


def position_bias(rows: Sequence[Mapping[str, Any]]) -> PositionBias | None:
    """The bias shown in preference rows, one unit a row: its principles are averaged. None without any."""
    both = [found for row in rows if (found := _both(row)) is not None]
    if not both:
        return None
    one, two = np.array(both).T
    place, answers = (one + two - 1) / 2, (one - two) / 2

    def share(drawn: NDArray[np.float64]) -> float:
        at = drawn.astype(int)
        moved = float((place[at] ** 2).sum()), float((answers[at] ** 2).sum())
        return moved[0] / sum(moved) if sum(moved) > 0 else 0.5

    letter = "A" if place.mean() >= 0 else "B"
    return PositionBias(bootstrap(place), bootstrap(np.arange(len(place)), share), letter)


def refuse_biased(rows: Sequence[Mapping[str, Any]], limit: float = LIMIT) -> PositionBias | None:
    """The bias of these rows. `JudgeBiased`, naming judge and letter, when position decides."""
    bias = position_bias(rows)
    if bias is not None and bias.binds(limit):
        judge = next(str(r.get("judge_name", "the judge")) for r in rows)
        raise JudgeBiased(
            f"{judge} chooses by position: {bias}. That is more than {limit:.2f} of it, so its labels "
            f"say where an answer stood. None is used; the rows are kept. Take another judge or wording, or "
            "raise position_limit if you have reason to trust the average of both orders"
        )
    return bias


def _both(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean P(A) over principles (with the first answer as A, with the second as A); None if one lacks."""
    orders = [[j["p_a"] for j in row["judgements"] if j["order"] == order] for order in ("AB", "BA")]
    if not all(orders):
        return None
    one, two = (sum(ps) / len(ps) for ps in orders)
    return one, two
