"""How unusual something is among clean twins: split conformal, exact at any number of twins.

The twins are dealt in three before anything is measured: some say what is normal (centre and spread of every
quantity), most are ranked, one is held out as the control. How far a run departs is the largest of its
quantities' deviations. If the run is a clean run like the ranked ones (exchangeable with them), the share of
them, itself counted, that depart at least as far is a p-value: it is at most alpha with probability at most
alpha, whatever the distribution (Vovk, Gammerman & Shafer 2005; Papadopoulos et al. 2002 for the split).

Several moments of a run (its gates) cost no level: a twin is ranked by the farthest it *ever* departs, so
that a run which departs farther at any moment is the farthest of all, which a clean one is with probability
1/(n + 1). No test that is exact for exchangeable runs can do better than that with n twins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.base.errors import VerificationError

PRIOR = 4.0  # twins that the usual spread of all quantities counts for, beside a quantity's own
LEAST_FIT = 3
SPREAD_FLOOR = 0.02  # log units; a quantity known better than to 2% is not


@dataclass(frozen=True)
class Normal:
    """What is normal: centre and spread [quantity], in the units of the quantities (here logarithms)."""

    centre: np.ndarray
    spread: np.ndarray

    def z(self, values: np.ndarray) -> np.ndarray:
        """Deviations [..., quantity]."""
        return np.asarray((values - self.centre) / self.spread)


def normal(values: np.ndarray) -> Normal:
    """Centre and spread of ``values`` [twin, quantity].

    A few twins know a quantity's spread badly, so each is drawn towards the usual spread of all (moderated,
    after Smyth 2004). This affects power only: the p-value is exact for any rule made from these twins alone.
    """
    n = len(values)
    own = values.var(0, ddof=1)
    usual = float(np.median(own)) if own.size else 0.0
    spread = np.sqrt(((n - 1) * own + PRIOR * usual) / (n - 1 + PRIOR))
    return Normal(values.mean(0), np.maximum(spread, SPREAD_FLOOR))


def p_value(score: float, twins: Sequence[float] | np.ndarray) -> float:
    """(1 + how many of the ``twins`` [n] score at least ``score``) / (n + 1). ValueError for NaN."""
    known = np.asarray(twins, dtype=np.float64)
    if math.isnan(score) or np.isnan(known).any():
        raise ValueError("NaN has no rank")
    return (1 + int((known >= score).sum())) / (len(known) + 1)


def dealt(n: int, fit: int | None = None) -> tuple[range, range, int]:
    """Of ``n`` twins in the order given: those that say what is normal, those that are ranked, the one held
    out. VerificationError when there are too few for one of each.
    """
    fitted = max(LEAST_FIT, n // 5) if fit is None else fit
    if fitted < LEAST_FIT or n < fitted + 2:
        raise VerificationError(
            f"{n} clean twins of which {fitted} say what is normal: at least {LEAST_FIT} must, one is held "
            f"out, and at least one ranked (1/alpha - 1 of them, to reach the level alpha)"
        )
    return range(fitted), range(fitted, n - 1), n - 1


def farthest(departures: Mapping[str, Sequence[float]]) -> np.ndarray:
    """The largest departure of every run [run] over all moments (moment -> [run])."""
    return np.max([np.asarray(v, dtype=np.float64) for v in departures.values()], axis=0)
