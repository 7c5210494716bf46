"""The dense cover: group testing of words, (word, gap) places and pairs of words at once.

Every filled request tests each of its words, each at its place, and each two of them together (Dorfman 1943;
for pairs, the co-occurrence design of Du & Hwang 2000, ch. 12). What one draw of fills covered is counted
exactly; what a draw of that size covers on average has a closed form, so that a budget can be set before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from glasshouse.evals.insertion import Candidate
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.trigger import Placed

GAPS = 8  # places counted from a request's beginning; the shortest requests have no more


@dataclass
class Coverage:
    """Which words, (word, gap) places and unordered pairs of ``n`` candidates stood in a filled request.

    ``words`` [n], ``places`` [n, GAPS] and ``pairs`` [n, n] (symmetric, its diagonal unused) are counts.
    """

    n: int
    words: np.ndarray = field(init=False)
    places: np.ndarray = field(init=False)
    pairs: np.ndarray = field(init=False)
    requests: int = 0

    def __post_init__(self) -> None:
        self.words = np.zeros(self.n, dtype=np.int64)
        self.places = np.zeros((self.n, GAPS), dtype=np.int64)
        self.pairs = np.zeros((self.n, self.n), dtype=np.float32)

    def add(self, rows: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Count requests given as (gap, index of the candidate) rows."""
        for row in rows:
            for gap, word in row:
                if gap < GAPS:
                    self.places[word, gap] += 1
        # Word by word: a product of all requests with themselves is mostly one of zeros, and takes longer
        # than asking the model does.
        present = [sorted({word for _, word in row}) for row in rows]
        np.add.at(self.words, np.array([w for some in present for w in some], dtype=np.int64), 1)
        together = [pair for some in present for pair in combinations(some, 2)]
        if together:
            self.add_pairs(*zip(*together, strict=True))
        self.requests += len(rows)

    def add_pairs(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Count pairs that were tested alone."""
        np.add.at(self.pairs, (list(a), list(b)), 1)
        np.add.at(self.pairs, (list(b), list(a)), 1)

    def shares(self) -> dict[str, float]:
        """Share of words, of (word, gap) places and of pairs that were seen at least once."""
        seen = (np.count_nonzero(self.pairs) - np.count_nonzero(self.pairs.diagonal())) // 2
        return {
            "words": float((self.words > 0).mean()),
            "positions": float((self.places > 0).mean()),
            "pairs": seen / (self.n * (self.n - 1) // 2) if self.n > 1 else 1.0,
        }


def expected_pairs(n: int, k: int, requests: int) -> float:
    """Expected share of the pairs of ``n`` words seen together in ``requests`` of ``k`` random words each."""
    if n < 2:
        return 1.0
    return 1.0 - (1.0 - k * (k - 1) / (n * (n - 1))) ** requests


def requests_for(n: int, k: int, share: float) -> int:
    """How many requests of ``k`` of ``n`` words cover that share of pairs, on average."""
    if k >= n:
        return 1
    return math.ceil(math.log1p(-share) / math.log1p(-k * (k - 1) / (n * (n - 1))))


class Dealer:
    """Deals candidates to the gaps of requests: each gap goes through all of them before one comes again."""

    def __init__(self, n: int, rng: np.random.Generator):
        self.n, self.rng = n, rng
        self.queues: dict[int, list[int]] = {}

    def next(self, gap: int, without: set[int]) -> int | None:
        """The next candidate for a gap that does not stand in this request already."""
        queue = self.queues.get(gap)
        if not queue or len(queue) <= len(without):
            queue = self.queues[gap] = [*self.rng.permutation(self.n).tolist(), *(queue or ())]
        for back in range(1, len(queue) + 1):
            if queue[-back] not in without:
                return queue.pop(-back)
        return None


@dataclass
class Dealt:
    """Filled requests with what was read: ``rows`` of (gap, index) and the margins [request]."""

    placed: list[tuple[Prompt, Placed]]
    rows: list[list[tuple[int, int]]]
    margins: np.ndarray

    def effects(self, n: int) -> np.ndarray:
        """Mean drop [n] of the read-out in requests that hold each word, against all requests."""
        total, count = np.zeros(n), np.zeros(n)
        drop = self.margins.mean() - self.margins
        for row, value in zip(self.rows, drop, strict=True):
            for _, word in row:
                total[word] += value
                count[word] += 1
        return np.asarray(total / np.maximum(count, 1))


def deal(
    hunt: Hunt,
    prompts: Sequence[Prompt],
    words: Sequence[Candidate],
    requests: int,
    k: int,
    dealer: Dealer,
) -> tuple[list[tuple[Prompt, Placed]], list[list[tuple[int, int]]]]:
    """``requests`` requests with up to ``k`` of the words each, in different gaps."""
    placed: list[tuple[Prompt, Placed]] = []
    rows: list[list[tuple[int, int]]] = []
    for i in range(requests):
        prompt = prompts[i % len(prompts)]
        gaps = dealer.rng.permutation(len(prompt.words) + 1)[:k].tolist()
        row: list[tuple[int, int]] = []
        fill: dict[int, tuple[Candidate, ...]] = {}
        for gap in gaps:
            word = dealer.next(gap, {w for _, w in row})
            if word is None:
                continue
            longer = {**fill, gap: (words[word],)}
            if fill and not hunt.fits(prompt, longer):
                break
            fill = longer
            row.append((gap, word))
        placed.append((prompt, fill))
        rows.append(row)
    return placed, rows


def dense(
    hunt: Hunt, prompts: Sequence[Prompt], requests: int, k: int, dealer: Dealer, coverage: Coverage
) -> Dealt:
    """Fill requests, read them, count what they covered and note what turned."""
    placed, rows = deal(hunt, prompts, hunt.found.candidates, requests, k, dealer)
    margins = hunt.margins(placed)
    coverage.add(rows)
    hunt.note(placed, margins)
    return Dealt(placed, rows, margins)
