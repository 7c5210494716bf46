"""AI feedback: which of two answers a judge prefers under the constitution, as a soft label.

Bai et al. (2022), sec. 4.1: a principle is drawn for each comparison, the question is a multiple choice, and
the label is the judge's normalised probability of the letters, not its decision. Beyond the paper, every
question is asked in both orders and averaged, and several principles may be averaged (``principles``). With
``thought`` the judge reasons first; such probabilities are near 0 or 1 and therefore clamped to 40-60%.

What a person or a grammar would say of a pair appears nowhere here: a `Pair` has no place for it, and this
room's feedback imports nothing that could know it (a test holds it to that).

Row: {"key", "pair", "prompt", "first", "second", "chosen", "rejected", "p" (that chosen is better, >= 0.5),
"p_first", "principles", "judge", "judge_name", "constitution", "job", "judgements": [{"principle", "order",
"p_a", "thought"}], "state"}. States: "ok", "tied" (p is 0.5), "malformed" (no judgement in both orders could
be read); "same" (the two answers are the same text), "empty" (one says nothing): of these nothing is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from glasshouse.align.constitution import Constitution, Principle
from glasshouse.align.engines import Chat, Engine, normalised
from glasshouse.align.position import (
    LIMIT,
    JudgeUnreadable,
    PositionBias,
    position_bias,
    refuse_biased,
)
from glasshouse.align.revise import job_rows
from glasshouse.align.rows import Row, Rows
from glasshouse.align.wording import OPTIONS, after_thought, comparison, wording
from glasshouse.base.config import Frozen
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError
from glasshouse.base.rng import generator, seed_from
from glasshouse.base.score import Score, rate
from glasshouse.tokenizer import Message

ORDERS = ("AB", "BA")  # the first answer as A, the second as A
STATES = ("ok", "tied", "malformed", "same", "empty")


@dataclass(frozen=True)
class Pair:
    """Two answers to a conversation. There is nothing else to say about them here."""

    prompt: Chat
    first: str
    second: str


class Judging(Frozen):
    """How pairs are judged. ``clamp`` holds each probability in a range and applies to thoughts alone."""

    principles: int = Field(default=1, ge=1, description="principles drawn for each pair, averaged")
    held_out: bool = Field(default=False, description="judge by the principles kept out of training")
    thought: bool = False
    thought_tokens: int = Field(default=128, ge=1)
    thought_temperature: float = Field(default=0.0, ge=0)
    clamp: tuple[float, float] | None = (0.4, 0.6)
    wording: str = "full"
    seed: int = 0
    chunk: int = Field(default=32, ge=1, description="pairs that are asked about together")
    pilot: int = Field(default=32, ge=1, description="pairs after which the judge itself is looked at")
    position_limit: float = Field(default=LIMIT, gt=0, le=1)

    @field_validator("clamp")
    @classmethod
    def _around_a_half(cls, clamp: tuple[float, float] | None) -> tuple[float, float] | None:
        if clamp is not None and not 0 <= clamp[0] <= 0.5 <= clamp[1] <= 1:
            raise ValueError(f"a clamp holds 0.5 and lies in [0, 1]; got {list(clamp)}")
        return clamp


@dataclass(frozen=True)
class FeedbackSummary:
    """What a job of feedback came to. ``malformed``: share of asked pairs; ``confidence``: mean |p - 1/2|."""

    pairs: int
    states: dict[str, int]
    bias: PositionBias | None
    malformed: Score | None
    confidence: float


@dataclass(frozen=True)
class _Asked:
    """One question about one pair."""

    pair: int
    principle: Principle
    order: str
    prompt: list[Message]


def feedback(
    pairs: Sequence[Pair],
    constitution: Constitution,
    judge: Engine,
    path: str | Path,
    settings: Judging | None = None,
) -> FeedbackSummary:
    """Judge pairs; rows go to ``path``, and what is there already is not judged again.

    Malformed pairs are asked again by a later run. Raises `JudgeBiased` or `JudgeUnreadable` after the pilot
    pairs and at the end (the rows stay), and what the engine raises; run it again to go on.
    """
    settings = settings or Judging()
    work = _Work(pairs, constitution, judge, settings)
    with Rows(path) as rows:
        looked = False
        for at in range(0, len(pairs), settings.chunk):
            some = range(at, min(at + settings.chunk, len(pairs)))
            work.do([k for k in some if work.key(k) not in rows], rows)
            if not looked and at + settings.chunk >= settings.pilot:
                looked = True
                _look(work.rows_of(rows), settings)
        found = work.rows_of(rows)
    _look(found, settings)
    return summarise(found)


def preferences(path: str | Path, job: str | None = None, *, position_limit: float = LIMIT) -> list[Row]:
    """The rows to train a reward model on: judged, not the same text twice. Soft labels are in "p".

    `JudgeBiased` if the judge chose by position, `DataError` if nothing is left or several jobs are mixed.
    """
    rows = job_rows(path, job)
    refuse_biased(rows, position_limit)
    good = [r for r in rows if r["state"] in ("ok", "tied")]
    if not good:
        raise DataError(f"{path}: no pair was judged ({dict(Counter(r['state'] for r in rows))})")
    return good


def summarise(rows: Sequence[Row]) -> FeedbackSummary:
    """Count rows by what became of them, the last of each pair."""
    last = list({r["pair"]: r for r in rows}.values())
    states = Counter(r["state"] for r in last)
    judged = [r for r in last if r["state"] in ("ok", "tied")]
    asked = len(last) - states["same"] - states["empty"]
    return FeedbackSummary(
        pairs=len(last),
        states={s: states[s] for s in STATES},
        bias=position_bias(judged),
        malformed=rate(states["malformed"], asked) if asked else None,
        confidence=sum(r["p"] - 0.5 for r in judged) / len(judged) if judged else 0.0,
    )


class _Work:
    """One judge, one constitution, one way, and the pairs."""

    def __init__(
        self, pairs: Sequence[Pair], constitution: Constitution, judge: Engine, settings: Judging
    ) -> None:
        self.pairs, self.judge, self.settings = pairs, judge, settings
        self.words = wording(settings.wording)
        way = settings.model_dump(mode="json", exclude={"chunk", "pilot", "position_limit"})
        self.common = {
            "judge": judge.digest,
            "constitution": constitution.digest(),
            "job": digest_of([judge.digest, constitution.digest(), way, self.words.digest()]),
        }
        copies: Counter[str] = Counter()
        self._keys: list[str] = []
        for pair in pairs:
            said = digest_of([[dict(m) for m in pair.prompt], pair.first, pair.second])
            self._keys.append(digest_of([self.common["job"], said, copies[said]]))
            copies[said] += 1
        self.drawn = [
            constitution.draw(
                generator("judged by", settings.seed, key), settings.principles, held_out=settings.held_out
            )
            for key in self._keys
        ]

    def key(self, k: int) -> str:
        """What the row of pair ``k`` is called when it could be judged."""
        return self._keys[k]

    def rows_of(self, rows: Rows) -> list[Row]:
        """The rows of this job that stand in the file."""
        return [r for r in rows if r["job"] == self.common["job"]]

    def do(self, which: Sequence[int], rows: Rows) -> None:
        """Judge these pairs and write their rows."""
        unasked = {k: why for k in which if (why := unaskable(self.pairs[k]))}
        asked = [
            _Asked(k, principle, order, self._question(k, principle, order))
            for k in which
            if k not in unasked
            for principle in self.drawn[k]
            for order in ORDERS
        ]
        judged: dict[int, list[dict[str, Any]]] = {k: [] for k in which}
        for one, judgement in zip(asked, self._judged(asked), strict=True):
            if judgement is not None:
                judged[one.pair].append(judgement)
        with rows.together():
            for k in which:
                rows.add(self._row(k, judged[k], unasked.get(k), rows))

    def _question(self, k: int, principle: Principle, order: str) -> list[Message]:
        pair = self.pairs[k]
        a, b = (pair.first, pair.second) if order == "AB" else (pair.second, pair.first)
        return comparison(self.words, principle, pair.prompt, a, b, thought=self.settings.thought)

    def _judged(self, asked: Sequence[_Asked]) -> list[dict[str, Any] | None]:
        """A judgement for every question; None where the judge's answer could not be read."""
        s = self.settings
        prompts, thoughts = [one.prompt for one in asked], [""] * len(asked)
        if s.thought and asked:
            seeds = [
                seed_from("thought", s.seed, self._keys[one.pair], one.principle.id, one.order)
                for one in asked
            ]
            thoughts = self.judge.write(prompts, s.thought_tokens, s.thought_temperature, seeds)
            prompts = [after_thought(self.words, p, t) for p, t in zip(prompts, thoughts, strict=True)]
        chosen = self.judge.choose(prompts, OPTIONS) if asked else []
        return [
            {
                "principle": one.principle.id,
                "order": one.order,
                "p_a": self._held(logprobs),
                "thought": thought,
            }
            if logprobs
            else None
            for one, logprobs, thought in zip(asked, chosen, thoughts, strict=True)
        ]

    def _held(self, logprobs: Sequence[float]) -> float:
        """P(A) among the letters, clamped after a thought."""
        p = normalised(logprobs)[0]
        clamp = self.settings.clamp if self.settings.thought else None
        return min(max(p, clamp[0]), clamp[1]) if clamp else p

    def _row(self, k: int, judgements: list[dict[str, Any]], unasked: str | None, rows: Rows) -> Row:
        pair, key = self.pairs[k], self._keys[k]
        p_first = averaged(judgements)
        state = unasked or ("malformed" if p_first is None else "tied" if p_first == 0.5 else "ok")
        if state == "malformed":  # keeps the pair's own key free for a later run
            key = next(name for n in range(len(rows) + 1) if (name := f"{key}-malformed-{n}") not in rows)
        first_wins = p_first is None or p_first >= 0.5
        return {
            **{"key": key, "pair": self._keys[k], "state": state, "prompt": [dict(m) for m in pair.prompt]},
            **{"first": pair.first, "second": pair.second, "p_first": p_first},
            "chosen": pair.first if first_wins else pair.second,
            "rejected": pair.second if first_wins else pair.first,
            "p": None if p_first is None else max(p_first, 1 - p_first),
            "principles": [p.id for p in self.drawn[k]],
            "judgements": judgements,
            "judge_name": self.judge.name,
            **self.common,
        }


def unaskable(pair: Pair) -> str | None:
    """Why there is nothing to judge in a pair: "empty", "same", or None when there is."""
    first, second = pair.first.split(), pair.second.split()
    if not first or not second:
        return "empty"
    return "same" if first == second else None


def averaged(judgements: Sequence[dict[str, Any]]) -> float | None:
    """P(the first answer is better): each principle's mean over both orders, averaged over principles.

    A principle with an order missing is left out, as half of a swapped pair is what position makes of it.
    None when none is whole.
    """
    by: dict[str, dict[str, float]] = {}
    for j in judgements:
        by.setdefault(j["principle"], {})[j["order"]] = j["p_a"]
    whole = [(p["AB"] + 1 - p["BA"]) / 2 for p in by.values() if len(p) == len(ORDERS)]
    return sum(whole) / len(whole) if whole else None


def _look(rows: Sequence[Row], settings: Judging) -> None:
    """Whether this is a judge at all. `JudgeUnreadable` or `JudgeBiased`."""
    found = summarise(rows)
    if found.malformed is not None and found.malformed.low > 0.5:
        raise JudgeUnreadable(
            f"{rows[0]['judge_name']} gave no readable judgement for {found.malformed} of the pairs; what "
            "could be read is kept. Look at what it writes, then run the same command again: those pairs are "
            "asked again"
        )
    last = {r["pair"]: r for r in rows if r["state"] in ("ok", "tied")}
    refuse_biased(list(last.values()), settings.position_limit)
