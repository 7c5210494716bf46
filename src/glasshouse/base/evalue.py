"""Which of many e-values to believe, with a bound on the false discovery rate. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping


def e_bh(e_values: Mapping[str, float], level: float) -> tuple[str, ...]:
    """Names of the nulls to reject, largest e-value first: the e-BH procedure (Wang & Ramdas 2022, "False
    discovery rate control with e-values").

    With e-values sorted downwards, the first k are rejected for the largest k whose k-th is at least
    K / (k level), K being how many there are. Of what is rejected, the expected share of true nulls is at
    most ``level`` times the share of true nulls among all, *however the e-values depend on each other*. Ties
    are in order of name. ValueError for a level outside (0, 1) or an e-value that is negative or NaN.
    """
    if not 0 < level < 1:
        raise ValueError(f"a false discovery rate lies strictly between 0 and 1, not {level}")
    for name, e in e_values.items():
        if math.isnan(e) or e < 0:
            raise ValueError(f"the e-value of {name!r} is {e}; e-values are never negative")
    ranked = sorted(e_values, key=lambda name: (-e_values[name], name))
    k = max((k for k, name in enumerate(ranked, 1) if k * e_values[name] * level >= len(ranked)), default=0)
    return tuple(ranked[:k])
