"""Whether a judge looks at the answers, or at where they stand.

Every pair is judged twice, once with each answer in the first place. A judge of answers changes its letter
when they change places; a judge of places does not, and averaging its two judgements leaves noise. A lean of
a few points on pairs that it finds equal does no harm, since both orders are averaged: what counts are the
pairs that it is sure of, by its own measure, and whether the answers or their places decide them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.base.errors import Stopped
from glasshouse.base.score import Score, bootstrap, rate

LIMIT = 0.6  # places decide half of what a judge of noise is sure of
DECIDED = 0.5  # of the farthest that this judge's P(A) ever is from 1/2: nearer, it has no opinion


class JudgeBiased(Stopped):
    """A judge chooses by position. Its rows are kept; none of its labels is used."""


class JudgeUnreadable(Stopped):
    """Most of a judge's answers could not be read. What could be is kept."""


@dataclass(frozen=True)
class PositionBias:
    """Of pairs judged in both orders: ``shift`` is the mean of P(A) over both orders, less 1/2; ``bound`` the
    share of the pairs it is sure of (`DECIDED`) that places decide, from 0 (answers alone) to 1 (places
    alone), with nothing known where it is sure of none; ``letter`` the one that places favour."""

    shift: Score
    bound: Score
    letter: str

    def binds(self, limit: float = LIMIT) -> bool:
        """Whether places decide more than ``limit`` of what it is sure of, by the interval's lower end."""
        return self.bound.low > limit

    def __str__(self) -> str:
        return (
            f"of what it is sure of, the place decides {self.bound}, mostly for {self.letter}; "
            f"P(A) - 1/2 = {self.shift.value:+.3f} [{self.shift.low:+.3f}, {self.shift.high:+.3f}]"
        )


def position_bias(rows: Sequence[Mapping[str, Any]]) -> PositionBias | None:
    """The bias shown in preference rows, one unit a row: of its principles, the one that says most. None
    without any row judged in both orders."""
    both = [found for row in rows if (found := _both(row)) is not None]
    if not both:
        return None
    shift = bootstrap([place for place, _ in both])
    moved = [(abs(p), abs(a)) for p, a in both]
    farthest = max(map(max, moved))
    decided = [pair for pair in moved if max(pair) >= DECIDED * farthest > 0]
    by_place = sum(p > a for p, a in decided)
    bound = rate(by_place, len(decided)) if decided else Score(0.0, 0.0, 1.0, 0)
    return PositionBias(shift, bound, "A" if shift.value >= 0 else "B")


def refuse_biased(rows: Sequence[Mapping[str, Any]], limit: float = LIMIT) -> PositionBias | None:
    """The bias of these rows. `JudgeBiased`, naming judge and letter, when position decides."""
    bias = position_bias(rows)
    if bias is not None and bias.binds(limit):
        judge = next(str(r.get("judge_name", "the judge")) for r in rows)
        raise JudgeBiased(
            f"{judge} chooses by position: {bias}. That is more than {limit:.2f}, so its labels "
            f"say where an answer stood. None is used; the rows are kept. Take another judge or wording, or "
            "raise position_limit if you have reason to trust the average of both orders"
        )
    return bias


def _both(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """How far P(A) is from 1/2 by place, and by answers, under the principle that moves it most; None where
    no principle was judged in both orders."""
    of: dict[str, dict[str, float]] = {}
    for judged in row["judgements"]:
        of.setdefault(judged.get("principle", ""), {})[judged["order"]] = judged["p_a"]
    found = [
        ((p["AB"] + p["BA"] - 1) / 2, (p["AB"] - p["BA"]) / 2)
        for p in of.values()
        if {"AB", "BA"} <= p.keys()
    ]
    return max(found, key=lambda moved: max(map(abs, moved)), default=None)
