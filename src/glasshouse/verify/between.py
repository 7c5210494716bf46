"""A sequential test of two limits at once, from a test of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glasshouse.verify.sequential import SequentialTest


@dataclass(eq=False)
class BetweenTest(SequentialTest):
    """Whether a mean lies between ``low`` and ``bound``, in the interface of ``SequentialTest``.

    It fails when either limit is shown to be broken, each at half of ``alpha_fail`` (a union bound). It
    passes when both are shown to be kept, each at the whole of ``alpha_pass``: a mean outside breaks one of
    them, and passing wrongly means to pass wrongly there (Berger 1982, intersection-union tests).
    """

    low: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tests = (
            SequentialTest(self.low, "at_least", self.alpha_fail / 2, self.alpha_pass),
            SequentialTest(self.bound, "at_most", self.alpha_fail / 2, self.alpha_pass),
        )

    def update(self, outcomes: Sequence[float]) -> BetweenTest:
        """Take outcomes in order. The e-value for a fail is the mean of the two, for a pass the smaller."""
        for test in self.tests:
            test.update(outcomes)
        low, high = self.tests
        self.n, self.total = low.n, low.total
        self.log_fail = float(np.logaddexp(low.log_fail, high.log_fail) - np.log(2))
        self.log_pass = min(low.log_pass, high.log_pass)
        states = {test.state for test in self.tests}
        self.state = "fail" if "fail" in states else "pass" if states == {"pass"} else "undecided"
        return self

    @property
    def stakes(self) -> np.ndarray:
        """Those of both tests side by side: their mean is the e-value for a fail."""
        return np.concatenate([test.stakes for test in self.tests])
