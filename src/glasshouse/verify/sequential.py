"""Sequential tests with error levels that hold whenever one stops looking.

An e-process against a null is a wealth that, were the null true, would on average not grow; by Ville's
inequality (1939) it ever exceeds 1/alpha with probability at most alpha. Here the null is a bound on the
mean of outcomes in [0, 1] and the wealth comes from betting against it, averaged over a fixed grid of bet
sizes (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting"). It is enough
that each outcome's mean *given those before it* keeps the bound; outcomes need not be independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

BETS = np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])  # shares of the largest admissible bet
# Most passes are asked of models without one bad outcome, where the largest bet is best: more on large ones.
PASS_BETS = np.append(BETS, 0.99)
PASS_LOG_WEIGHTS = np.log(PASS_BETS / PASS_BETS.sum())

Side = Literal["at_most", "at_least"]


@dataclass(eq=False)
class SequentialTest:
    """Two one-sided e-processes about a mean: one can show the bound is broken, one that it is kept.

    ``update`` takes outcomes in [0, 1] in the order they were seen. ``state`` becomes "fail" when the
    e-value against "the bound is kept" reaches 1/alpha_fail, "pass" when the one against "the bound is
    broken or just met" reaches 1/alpha_pass, and stays; until then it is "undecided".
    """

    bound: float
    side: Side
    alpha_fail: float
    alpha_pass: float
    n: int = 0
    total: float = 0.0
    state: Literal["fail", "pass", "undecided"] = "undecided"
    log_fail: float = 0.0
    log_pass: float = 0.0
    _wealth_fail: np.ndarray = field(default_factory=lambda: np.zeros(len(BETS)))
    _wealth_pass: np.ndarray = field(default_factory=lambda: np.zeros(len(PASS_BETS)))

    def __post_init__(self) -> None:
        if not 0 < self.bound < 1:
            raise ValueError(f"a bound on a rate lies strictly between 0 and 1, not {self.bound}")
        if not (0 < self.alpha_fail < 1 and 0 < self.alpha_pass < 1):
            raise ValueError("error levels lie strictly between 0 and 1")

    def update(self, outcomes: Sequence[float]) -> SequentialTest:
        """Take outcomes in order; those after the decision count for the estimate only."""
        for x in outcomes:
            if not 0 <= x <= 1:
                raise ValueError(f"outcome {x} is outside [0, 1]")
            self.n += 1
            self.total += float(x)
            self._bet(float(x))
        return self

    def _bet(self, x: float) -> None:
        """Bet on outcomes above the bound (that breaks ``at_most``), and on outcomes below it."""
        y, m = (x, self.bound) if self.side == "at_most" else (1 - x, 1 - self.bound)
        self._wealth_fail += np.log1p(BETS / m * (y - m))
        self._wealth_pass += np.log1p(-PASS_BETS / (1 - m) * (y - m))
        self.log_fail = log_mean(self._wealth_fail)
        self.log_pass = log_sum(self._wealth_pass + PASS_LOG_WEIGHTS)
        if self.state == "undecided":
            if self.log_fail >= -math.log(self.alpha_fail):
                self.state = "fail"
            elif self.log_pass >= -math.log(self.alpha_pass):
                self.state = "pass"

    @property
    def estimate(self) -> float:
        """Mean of all outcomes; NaN before the first."""
        return self.total / self.n if self.n else math.nan

    @property
    def stakes(self) -> np.ndarray:
        """log wealth [bets] that each of `BETS` won against "the bound is kept"; what a detector goes on."""
        return self._wealth_fail.copy()

    @property
    def e_fail(self) -> float:
        """E-value against the bound being kept, capped at 1e12 so that it can be written down."""
        return math.exp(min(self.log_fail, 27.6))

    @property
    def e_pass(self) -> float:
        """E-value against the bound being broken."""
        return math.exp(min(self.log_pass, 27.6))


def log_sum(log_wealth: np.ndarray) -> float:
    """log of the sum of exp(``log_wealth``) [bets]; -inf where there is no wealth at all."""
    top = log_wealth.max()
    return float(top + np.log(np.exp(log_wealth - top).sum())) if np.isfinite(top) else -math.inf


def log_mean(log_wealth: np.ndarray) -> float:
    """log of the mean of exp(``log_wealth``) [bets]."""
    return log_sum(log_wealth) - math.log(len(log_wealth))
