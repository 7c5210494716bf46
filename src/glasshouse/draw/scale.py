"""From values to pixels: linear and logarithmic scales with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def finite(values: Iterable[float]) -> list[float]:
    """The values that can be placed on an axis."""
    return [v for v in values if math.isfinite(v)]


@dataclass(frozen=True)
class Scale:
    """Maps [lo, hi] onto [start, stop] pixels; `log` places equal ratios at equal distances (lo > 0)."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of `value`, held to the axis' own ends so that nothing is drawn outside the chart."""
        lo, hi = (math.log(self.lo), math.log(self.hi)) if self.log else (self.lo, self.hi)
        at = math.log(max(value, self.lo)) if self.log else value
        share = (at - lo) / (hi - lo) if hi > lo else 0.5
        return self.start + (self.stop - self.start) * min(1.0, max(0.0, share))


def ticks(lo: float, hi: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers within [lo, hi] (steps of 1, 2, 2.5 or 5 times a power of ten)."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw), 10 * power)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    if last - first > 50:  # a span so far from zero that floats cannot resolve the step
        return [lo, hi]
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(lo: float, hi: float, most: int = 7) -> list[float]:
    """1, 2, 5 times powers of ten within [lo, hi]; powers alone when too many, both ends when too few."""
    low, high = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    fine = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5) if lo <= m * 10.0**e <= hi]
    if len(fine) > most:
        fine = [v for v in fine if f"{v:e}".startswith("1")]
        fine = fine[:: math.ceil(len(fine) / most)]
    return fine if len(fine) > 1 else [lo, hi]


# Values beyond these are drawn at the edge: nearer the limits of floats a step or a ratio overflows.
_HUGE, _TINY = 1e30, 1e-30


def domain(values: Iterable[float], log: bool = False, pad: float = 0.06) -> tuple[float, float]:
    """Ends of an axis that holds all finite `values` with a little air; (0, 1) when there are none."""
    known = [v for v in finite(values) if v > 0 or not log]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    lo, hi = (max(-_HUGE, min(_HUGE, v)) for v in (min(known), max(known)))
    if log:
        lo, hi = max(lo, _TINY), max(hi, _TINY)
        ratio = max(hi / lo, 1.05) ** pad
        return lo / ratio, hi * ratio
    air = (hi - lo) * pad or abs(hi) * 0.1
    air = max(air, _TINY, 1e-9 * max(abs(lo), abs(hi)))
    return lo - air, hi + air


def label(value: float) -> str:
    """A number as a reader wants it on an axis or in a table: three digits, thousands as k, M, B."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for bound, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if bound <= size < 1e15:
            unit = 1e3 if suffix == "k" else bound
            return f"{value / unit:.3g}{suffix}"
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
