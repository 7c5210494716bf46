"""What many gates show together although each alone is undecided: a restarting e-detector.

An e-detector (Shin, Ramdas & Rinaldo 2023, "E-detectors: a nonparametric framework for sequential change
detection") is a sum, or a maximum, of e-processes of which one starts at every gate, so that what
was seen before a change does not weigh against what is seen after it. Both forms have a recursion; for one
size of bet, with L the wealth a gate's outcomes win and a the stake put down at it,

    sum (Shiryaev-Roberts)  S <- (S + a) L          max (CUSUM)  S <- max(S, a) L

and the detector's value is the mean of S over the bets (`SequentialTest.stakes`). It raises an alarm when
that reaches 1.

What the level means. Let every gate's outcomes keep the bound, each in the mean given what was seen before.
Then S minus the stakes put down is a supermartingale, and the *expected number of alarms* in a whole run,
restarts after alarms included, is at most the sum of all stakes (optional stopping; the max is below the
sum). Two uses:

- stakes that add up to alpha over the run (`examination.error_share`): the chance of any false alarm in the
  run is at most alpha, however long it gets;
- one stake 1/A at every gate for ever: at least A gates go by, on average, before a false alarm (the average
  run length); nothing is promised about one run.

The stake of a gate is the level its own test has. A test that fails at level a has won at least 1/a at that
moment, so that the detector's value, looked at then, is at least 1 too. So the chance that *any* gate's own
test or the detector fails wrongly is bounded by the sum of the stakes once: watching costs no level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from glasshouse.base.errors import VerificationError
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.sequential import SequentialTest, log_mean

Form = Literal["sum", "max"]
KEY = "detector"  # under which a constraint's memory holds the state


@dataclass(eq=False)
class Detector:
    """Evidence, gathered over gates, that a bound is broken by now.

    ``gate`` is the last one it was told of, ``gates`` how many since it last began anew, ``alarms`` those at
    which it was raised. Its state is a handful of numbers; going on from a state read back is the same as
    never having stopped.
    """

    form: Form = "sum"
    gate: int = -1
    gates: int = 0
    alarms: list[int] = field(default_factory=list)
    log_wealth: np.ndarray = field(default_factory=lambda: np.full(1, -math.inf))  # [bets]
    _best: np.ndarray = field(default_factory=lambda: np.full(1, -math.inf))  # the same in the max form
    _since: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))  # where `_best` began

    def take(self, gate: int, stakes: Sequence[float] | np.ndarray, level: float) -> bool:
        """Add one gate. True when it raises the alarm; the detector then begins anew.

        ``stakes`` [bets] are `SequentialTest.stakes` of the gate's outcomes, in log; ``level`` is what is put
        down. ValueError for a gate already taken, a level outside (0, 1), or other bets than before.
        """
        won = np.asarray(stakes, dtype=np.float64)
        if gate <= self.gate:
            raise ValueError(f"gate {gate} comes after gate {self.gate}, which was taken already")
        if self.gates and won.shape != self.log_wealth.shape:
            raise ValueError(f"{won.shape} bets, where the gates before had {self.log_wealth.shape}")
        if not 0 < level < 1 or won.ndim != 1 or np.isnan(won).any():
            raise ValueError("a gate's level lies in (0, 1) and its stakes are a row of numbers")
        put = math.log(level)
        self._since = np.where(self._best < put, gate, self._since)
        self._best = np.maximum(self._best, put) + won
        self.log_wealth = np.logaddexp(self.log_wealth, put) + won if self.form == "sum" else self._best
        self.gate, self.gates = gate, self.gates + 1
        if self.log_value < 0:
            return False
        self.alarms.append(gate)
        self.restart()
        return True

    def restart(self) -> None:
        """Forget the evidence. Whenever that is done, false alarms become no likelier."""
        self.gates = 0
        self.log_wealth, self._best = np.full(1, -math.inf), np.full(1, -math.inf)

    @property
    def log_value(self) -> float:
        """log of the value that raises the alarm at 0; -inf before the first gate."""
        return log_mean(self.log_wealth)

    @property
    def value(self) -> float:
        """The evidence as a share of what raises the alarm."""
        return math.exp(min(self.log_value, 27.6))

    @property
    def since(self) -> int | None:
        """The gate from which the evidence speaks most clearly: the start of the best single e-process."""
        return int(self._since[int(self._best.argmax())]) if self.gates else None

    def state(self) -> dict[str, Any]:
        """A small JSON object."""
        return {
            "form": self.form,
            "gate": self.gate,
            "gates": self.gates,
            "alarms": list(self.alarms),
            "log_wealth": _written(self.log_wealth),
            "best": _written(self._best),
            "since": [int(s) for s in self._since],
            "value": self.value,
        }

    @classmethod
    def resume(cls, state: Mapping[str, Any]) -> Detector:
        """The detector whose `state` this is. VerificationError for anything else: nothing may rest on it."""
        try:
            found = cls(
                state["form"],
                int(state["gate"]),
                int(state["gates"]),
                [int(g) for g in state["alarms"]],
                _read(state["log_wealth"]),
                _read(state["best"]),
                np.array(state["since"], dtype=np.int64),
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise VerificationError(f"a detector's state cannot be read: {problem!r}") from problem
        one_shape = found.log_wealth.shape == found._best.shape and found.log_wealth.ndim == 1
        if found.form not in get_args(Form) or not one_shape or not len(found.log_wealth):
            raise VerificationError("a detector's state is not of this version; begin the run anew")
        return found


def follow(exam: Examination, finding: Finding) -> Finding:
    """Let this gate's outcomes join those of earlier gates; an alarm turns ``undecided`` into ``fail``.

    Nothing joins where nothing was measured or the control was out of bounds. The detector begins anew after
    a fail, which has told what it knew, and where a gate that was due is missing between its state and now:
    after a rollback it would count the outcomes of an abandoned branch.
    """
    kept, gate = exam.around.kept.get(KEY), gate_of(exam)
    detector = Detector.resume(kept) if kept is not None else Detector()
    if detector.gates and gate - detector.gate > max(exam.constraint.every, 1):
        detector.restart()
    sound = finding.control is None or finding.control["ok"]
    if finding.tests and sound and gate > detector.gate:
        began = detector.gates
        alarm = detector.take(gate, together(finding.tests), exam.alpha_fail)
        if alarm and finding.status == "undecided":
            finding.status = "fail"
            finding.reason = (
                f"drift: this gate alone is undecided, but together with the {began} before it the evidence "
                f"that the bound is broken reaches the level. {finding.reason}"
            ).strip()
        if finding.status == "fail":
            detector.restart()
    detector.gate = max(detector.gate, gate)
    if kept is not None or finding.tests:
        finding.memory = {**finding.memory, KEY: detector.state()}
    return finding


def together(tests: Sequence[SequentialTest]) -> np.ndarray:
    """log stakes [bets] of several tests of a gate: their mean, which keeps its level however they depend."""
    return np.asarray(np.logaddexp.reduce([t.stakes for t in tests], axis=0) - math.log(len(tests)))


def gate_of(exam: Examination) -> int:
    """The gate's index, the last part of the seed; 0 in an audit, which has no gates."""
    last = exam.seed[-1]
    return int(last) if last.isdigit() else 0


def _written(log_wealth: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in log_wealth]


def _read(listed: Sequence[float | None]) -> np.ndarray:
    return np.array([-math.inf if v is None else v for v in listed], dtype=np.float64)
