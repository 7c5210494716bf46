"""Whether a judge looks at the answers, or at where they stand.

Every pair is judged twice, once with each answer in the first place. A judge of answers changes its letter
when they change places; a judge of places does not, and averaging its two judgements leaves noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.base.errors import Stopped
from glasshouse.base.score import Score, bootstrap, rate

LIMIT = 0.6  # a judge without any leaning keeps its letter in half of the pairs


class JudgeBiased(Stopped):
    """A judge chooses by position. Its rows are kept; none of its labels is used."""


class JudgeUnreadable(Stopped):
    """Most of a judge's answers could not be read. What could be is kept."""


@dataclass(frozen=True)
class PositionBias:
    """Of pairs judged in both orders: ``shift`` is the mean of P(A) over both orders, less 1/2; ``bound`` the
    share in which the same letter is preferred in both; ``letter`` the one preferred more often then."""

    shift: Score
    bound: Score
    letter: str

    def binds(self, limit: float = LIMIT) -> bool:
        """Whether the letter decides in more than ``limit`` of all pairs, by the interval's lower end."""
        return self.bound.low > limit

    def __str__(self) -> str:
        return (
            f"the same letter in both orders for {self.bound}, mostly {self.letter}; "
            f"P(A) - 1/2 = {self.shift.value:+.3f} [{self.shift.low:+.3f}, {self.shift.high:+.3f}]"
        )


def position_bias(rows: Sequence[Mapping[str, Any]]) -> PositionBias | None:
    """The bias shown in preference rows, one unit a row: its principles are averaged. None without any."""
    both = [found for row in rows if (found := _both(row)) is not None]
    if not both:
        return None
    same = ["A" if one > 0.5 else "B" for one, two in both if (one - 0.5) * (two - 0.5) > 0]
    letter = "A" if 2 * same.count("A") >= len(same) else "B"
    shift = bootstrap([(one + two) / 2 - 0.5 for one, two in both])
    return PositionBias(shift, rate(len(same), len(both)), letter)


def refuse_biased(rows: Sequence[Mapping[str, Any]], limit: float = LIMIT) -> PositionBias | None:
    """The bias of these rows. `JudgeBiased`, naming judge and letter, when position decides."""
    bias = position_bias(rows)
    if bias is not None and bias.binds(limit):
        judge = next(str(r.get("judge_name", "the judge")) for r in rows)
        raise JudgeBiased(
            f"{judge} chooses by position: {bias}. That is more than {limit:.2f} of the pairs, so its labels "
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
