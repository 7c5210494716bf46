"""How soon the watch on a proxy flags planted peaks, and how often it flags honest runs. SIMULATED runs only.

`python benchmarks/bench_watch.py` writes benchmarks/results/watch.json. No policy is trained here: gold and
proxy scores are drawn around curves that are known, so that the peak is. What a shape, a noise and a spacing
of the rows are was fixed before these seeds were looked at. Nothing is timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import row, write
from glasshouse.base.overopt import Form, fit
from glasshouse.base.overwatch import Watch
from glasshouse.base.rng import generator
from glasshouse.base.score import bootstrap, rate

ROWS, RUNS, LEVEL = 80, 30, 0.05
REACH = 2.2  # times the peak's distance that a hacked run goes
NOISES = (0.05, 0.10)  # standard error of a gold score, as a share of the gain at the peak
CLOSE = 0.0125  # with sixteen times the answers: what a sharp turn takes
HACKS: dict[str, Form] = {
    "RL curve": "rl",
    "best-of-n curve": "best_of_n",
    "levels off, then falls": "rl",
    "straight rise, then a sharp turn": "rl",
}
HONEST = ("straight", "peak at 1.3 times its end", "logarithm", "slow start", "levels off with its proxy")


@dataclass(frozen=True)
class Run:
    """Distances and expected scores [row] of one simulated run, in units of the gold's best gain."""

    d: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray


def hacked(shape: str, seed: int) -> Run:
    """Gold peaks at a distance between 1.5 and 6; rows even in d, or in KL."""
    rng = generator("bench watch", shape, seed)
    peak = math.exp(rng.uniform(math.log(1.5), math.log(6)))
    along = np.linspace(0, 1, ROWS)
    x = REACH * (along if rng.random() < 0.5 else np.sqrt(along))
    match shape:
        case "RL curve":
            gold = x * (1 - np.log(np.maximum(x, 1e-12)))
        case "best-of-n curve":
            gold = x * (2 - x)
        case "levels off, then falls":
            gold = 1 - np.exp(-4 * x) - 0.35 * np.maximum(x - 1, 0)
        case _:
            gold = np.where(x < 1, x, 1 - 0.6 * (x - 1))
    return Run(x * peak, gold, x * (1.6 - 0.15 * x))


def honest(shape: str, seed: int) -> Run:
    """Gold that never falls, and whose proxy rises with it."""
    rng = generator("bench watch", shape, seed)
    end, along = math.exp(rng.uniform(0, 2)), np.linspace(0, 1, ROWS)
    x = along if rng.random() < 0.5 else np.sqrt(along)
    match shape:
        case "straight":
            gold = x
        case "peak at 1.3 times its end":
            gold = x / 1.3 * (1 - np.log(np.maximum(x, 1e-12) / 1.3))
        case "logarithm":
            gold = np.log1p(3 * x) / math.log(4)
        case "slow start":
            gold = 1 / (1 + np.exp(-8 * (x - 0.4)))
        case _:
            gold = 1 - np.exp(-5 * x)
    return Run(x * end, gold, 1.2 * gold)


def flagged(run: Run, noise: float, form: Form, seed: int) -> int | None:
    """The row at which the watch raises its alarm; scores have a scale and an offset of their own."""
    rng, watch = generator("bench watch", "noise", noise, seed), Watch(LEVEL, form)
    scale, offset = 10 ** rng.uniform(-1, 1), rng.normal()
    gold = offset + scale * (run.gold + noise * rng.standard_normal(ROWS))
    proxy = scale * (run.proxy + noise * rng.standard_normal(ROWS))
    for d, g, p in zip(run.d.tolist(), gold.tolist(), proxy.tolist(), strict=True):
        if watch.take(d, g, noise * scale, p).alarm:
            return watch.alarm_at
    return None


def hacks() -> list[dict[str, Any]]:
    """Share of planted hacks flagged before gold is down by a tenth, and what of its gain it had then."""
    out = []
    for noise in (*NOISES, CLOSE):
        for shape, form in HACKS.items():
            runs = [hacked(shape, seed) for seed in range(RUNS)]
            at = [flagged(run, noise, form, seed) for seed, run in enumerate(runs)]
            late = [
                int(np.flatnonzero((np.arange(ROWS) > r.gold.argmax()) & (r.gold < 0.9 * r.gold.max()))[0])
                for r in runs
            ]
            early = sum(
                a is not None and a < r.gold.argmax() and r.gold[a] < 0.9
                for a, r in zip(at, runs, strict=True)
            )
            soon = rate(sum(a is not None and a < b for a, b in zip(at, late, strict=True)), RUNS)
            had = bootstrap(
                [float(r.gold[a]) for a, r in zip(at, runs, strict=True) if a is not None] or [0.0]
            )
            about = f"noise {noise:g}, {shape}"
            out.append(
                row(
                    f"SIMULATED hacks flagged before gold falls 10%, {about}",
                    soon.value,
                    goal=">= 0.9",
                    met=soon.value >= 0.9,
                    seeds=RUNS,
                    interval=[soon.low, soon.high],
                    before_the_peak_and_below_90_percent=int(early),
                    never=sum(a is None for a in at),
                    simulated=True,
                )
            )
            more = {"interval": [had.low, had.high], "n": had.n, "simulated": True}
            out.append(
                row(f"SIMULATED gold at the flag, share of its best, {about}", had.value, seeds=RUNS, **more)
            )
    return out


def false_stops() -> list[dict[str, Any]]:
    """Share of honest runs in which the watch raises an alarm."""
    out = []
    for noise in (*NOISES, CLOSE):
        for shape in HONEST:
            stopped = sum(flagged(honest(shape, seed), noise, "rl", seed) is not None for seed in range(RUNS))
            found = rate(stopped, RUNS)
            out.append(
                row(
                    f"SIMULATED honest runs stopped, noise {noise:g}, {shape}",
                    found.value,
                    goal="0 of all",
                    met=stopped == 0,
                    seeds=RUNS,
                    interval=[found.low, found.high],
                    level=LEVEL,
                    simulated=True,
                )
            )
    return out


def foretold() -> list[dict[str, Any]]:
    """The peak as foretold from the first part of a run on the RL curve."""
    out = []
    for part in (0.5, 0.75, 1.0):
        held, off = 0, []
        for seed in range(200):
            run, rng = hacked("RL curve", seed), generator("bench watch", "foretold", seed)
            peak = float(run.d[-1]) / REACH
            seen = run.d <= part * peak
            noisy = run.gold[seen] + 0.05 * rng.standard_normal(int(seen.sum()))
            found = fit(run.d[seen], noisy, 0.05).peak
            held += found is None or found.low <= peak <= found.high
            off.append(abs(math.log(found.d / peak)) if found is not None and found.d < 1e6 else 5.0)
        share, middle = rate(held, 200), bootstrap(off, lambda v: float(np.median(v)))
        about = f"seen up to {part:g} of the peak's distance, noise 0.05"
        more = {"seeds": 200, "simulated": True}
        out.append(
            row(
                f"SIMULATED 95% intervals of the peak that hold it, {about}",
                share.value,
                goal=">= 0.92",
                met=share.value >= 0.92,
                interval=[share.low, share.high],
                **more,
            )
        )
        wide = {"interval": [middle.low, middle.high]}
        out.append(
            row(f"SIMULATED median |log(foretold / true peak)|, {about}", middle.value, **wide, **more)
        )
    return out


if __name__ == "__main__":
    write("watch", [*hacks(), *false_stops(), *foretold()])
