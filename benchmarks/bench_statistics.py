"""Operating characteristics of the verdicts' statistics, simulated: false alarms, delay, power, passes, FDR.

`python benchmarks/bench_statistics.py` writes benchmarks/results/statistics.json; docs/statistics.md explains
it. Everything random has a fixed seed; intervals are at 95%. Nothing here is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binom, false_discovery_control, norm

from common import row, write
from glasshouse.base.evalue import e_bh
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.verify.detector import Detector, Form
from glasshouse.verify.examination import error_share
from glasshouse.verify.sequential import BETS, PASS_BETS, PASS_LOG_WEIGHTS, SequentialTest

GATES, SAMPLES, BOUND, RUNS, CHANGE = 400, 64, 0.05, 4000, 200
LEVEL = 0.05  # of a false alarm in a whole run
Alarms = np.ndarray  # [run, gate], True where a method would say that the bound is broken
SHARES = np.array([error_share(LEVEL, k, GATES) for k in range(GATES)])


def log_mean(x: np.ndarray) -> np.ndarray:
    """log of the mean of exp over the last axis."""
    top = x.max(-1)
    return np.asarray(top + np.log(np.exp(x - top[..., None]).mean(-1)))


def stakes(counts: np.ndarray, n: int = SAMPLES) -> np.ndarray:
    """`SequentialTest.stakes` [..., bets] of gates with ``counts`` [...] bad ones among ``n`` outcomes."""
    up, down = np.log1p(BETS * (1 - BOUND) / BOUND), np.log1p(-BETS)
    return np.asarray(counts[..., None] * up + (n - counts)[..., None] * down)


# -- five ways to watch a run --------------------------------------------------------------------------------


def each_gate(counts: np.ndarray, level: float) -> Alarms:
    """Exact binomial test of every gate by itself, at ``level``."""
    least = int(binom.isf(level, SAMPLES, BOUND)) + 1
    return counts >= least


def naive(counts: np.ndarray) -> Alarms:
    """A 5% test at every gate."""
    return each_gate(counts, 0.05)


def bonferroni(counts: np.ndarray) -> Alarms:
    """A 5% / 400 test at every gate."""
    return each_gate(counts, LEVEL / GATES)


def gate_alone(counts: np.ndarray) -> Alarms:
    """The gate's own e-process, begun anew at every gate, at its share of the level."""
    return log_mean(stakes(counts)) >= -np.log(SHARES)


def run_long(counts: np.ndarray) -> Alarms:
    """One e-process from the first gate on."""
    return log_mean(np.cumsum(stakes(counts), axis=1)) >= -math.log(LEVEL)


def detector(counts: np.ndarray, form: str = "sum") -> Alarms:
    """`verify.detector.Detector`, many runs at once."""
    won, wealth = stakes(counts), np.full((len(counts), len(BETS)), -np.inf)
    out = np.zeros(counts.shape, dtype=bool)
    for k in range(counts.shape[1]):
        join = np.logaddexp if form == "sum" else np.maximum
        wealth = join(wealth, math.log(SHARES[k])) + won[:, k]
        out[:, k] = log_mean(wealth) >= 0
        wealth[out[:, k]] = -np.inf
    return out


METHODS: dict[str, Callable[[np.ndarray], Alarms]] = {
    "a 5% test at every gate": naive,
    "Bonferroni over the gates": bonferroni,
    "each gate's own e-process": gate_alone,
    "one run-long e-process": run_long,
    "restarting e-detector, sum": detector,
    "restarting e-detector, max": lambda counts: detector(counts, "max"),
}


def same_as_the_product() -> None:
    """AssertionError unless the vectorised detectors raise the alarms that `Detector` raises."""
    rng = generator("bench statistics", "same")
    counts = rng.binomial(SAMPLES, np.repeat([[0.05], [0.08], [0.03]], 60, axis=1))
    forms: tuple[Form, ...] = ("sum", "max")
    for form in forms:
        for line, found in zip(counts, detector(counts, form), strict=True):
            d = Detector(form)
            for k, count in enumerate(line):
                test = SequentialTest(BOUND, "at_most", 0.5, 0.5)
                test.update([1.0] * int(count) + [0.0] * (SAMPLES - int(count)))
                assert d.take(k, test.stakes, float(SHARES[k])) == found[k]


def rates(kind: str) -> np.ndarray:
    """True rate [gate] of bad outcomes in one kind of run."""
    k = np.arange(GATES)
    late = k >= CHANGE
    match kind:
        case "on the bound":
            return np.full(GATES, BOUND)
        case "at half the bound":
            return np.full(GATES, BOUND / 2)
        case "jump 2.5% to 10%":
            return np.where(late, 0.10, 0.025)
        case "jump 2.5% to 7%":
            return np.where(late, 0.07, 0.025)
        case "drift 2.5% to 10%":  # over 200 gates; the bound is crossed at gate 266
            return 0.025 + 0.075 * np.clip((k - CHANGE) / 200, 0, 1)
        case "jump at gate 40":
            return np.where(k >= 40, 0.10, 0.025)
        case "10% from the start":
            return np.full(GATES, 0.10)
    raise ValueError(kind)


def drawn(kind: str) -> np.ndarray:
    """Bad outcomes [run, gate]."""
    return generator("bench statistics", kind).binomial(SAMPLES, rates(kind), (RUNS, GATES))


def shown(score: Score) -> dict[str, Any]:
    """A score's interval and size for a row."""
    return {"interval": [score.low, score.high], "n": score.n}


def false_alarms() -> list[dict[str, Any]]:
    """Alarms in runs of 400 gates that keep the bound at every gate."""
    earlier = "own earlier experiment, same set-up"
    out = []
    for kind in ("on the bound", "at half the bound"):
        counts = drawn(kind)
        for name, method in METHODS.items():
            alarms = method(counts)
            some, many = rate(int(alarms.any(1).sum()), RUNS), bootstrap(alarms.sum(1), draws=400)
            is_naive, hard = name == "a 5% test at every gate", kind == "on the bound"
            known = hard and name == "one run-long e-process"
            out.append(
                row(
                    f"runs with a false alarm, {kind}: {name}",
                    some.value,
                    peer=earlier if known else None,
                    peer_value=0.024 if known else None,
                    goal=f"<= {LEVEL}" if hard and not is_naive else None,
                    met=some.low <= LEVEL if hard and not is_naive else None,
                    seeds=RUNS,
                    **shown(some),
                )
            )
            if hard and is_naive:
                name = f"false alarms per run, {kind}: {name}"
                out.append(row(name, many.value, peer=earlier, peer_value=16.3, seeds=RUNS, **shown(many)))
    return out


def delays() -> list[dict[str, Any]]:
    """Gates from a change until the alarm, the alarm's own gate counted; in runs without one before."""
    peers = {"restarting e-detector, sum": 18.0, "one run-long e-process": 140.0}
    out = []
    for kind, change in (
        ("jump 2.5% to 10%", CHANGE),
        ("jump 2.5% to 7%", CHANGE),
        ("drift 2.5% to 10%", CHANGE + 67),
        ("jump at gate 40", 40),
        ("10% from the start", 0),
    ):
        counts = drawn(kind)
        for name, method in METHODS.items():
            alarms = method(counts)
            quiet = ~alarms[:, :change].any(1)
            seen = alarms[quiet, change:]
            late = np.where(seen.any(1), seen.argmax(1) + 1.0, math.inf)
            caught = rate(int(seen.any(1).sum()), max(len(seen), 1)) if len(seen) else None
            middle = float(np.quantile(late, 0.5, method="lower")) if len(late) else math.inf
            finite = math.isfinite(middle)
            known = bool(kind == "jump 2.5% to 10%" and name in peers)
            low, high = (np.quantile(late, q, method="lower") if len(late) else math.inf for q in (0.1, 0.9))
            out.append(
                row(
                    f"median delay in gates, {kind}: {name}",
                    middle if finite else None,
                    peer="own earlier experiment, same set-up" if known else None,
                    peer_value=peers[name] if known else None,
                    goal="<= 18" if known and "detector" in name else None,
                    met=middle <= 18 if known and "detector" in name else None,
                    seeds=RUNS,
                    tenth_to_ninetieth=[float(q) if math.isfinite(q) else None for q in (low, high)],
                    caught=None if caught is None else [caught.value, caught.low, caught.high],
                    runs_without_earlier_alarm=int(quiet.sum()),
                )
            )
    return out


# -- passing -------------------------------------------------------------------------------------------------


def samples_to_pass() -> list[dict[str, Any]]:
    """Outcomes, none of them bad, until a limit is shown to be kept; no test of that level needs fewer."""
    out = []
    for bound, level, peer in ((0.01, 0.01, 624), (0.05, 0.01, 123), (0.05, 0.002, None), (0.10, 0.01, None)):
        test = SequentialTest(bound, "at_most", 0.01, level)
        while test.state == "undecided":
            test.update([0.0])
        out.append(
            row(
                f"clean samples until PASS, limit {bound:.0%}, level {level:g}",
                test.n,
                peer="own earlier experiment" if peer else None,
                peer_value=peer,
                goal=f"<= {peer}" if peer else None,
                met=test.n <= peer if peer else None,
                least_possible=math.ceil(math.log(1 / level) / -math.log1p(-bound)),
            )
        )
    return out


def passes(true: float, bound: float, level: float, n: int, runs: int, purpose: str) -> np.ndarray:
    """Whether each of ``runs`` checks of at most ``n`` outcomes at rate ``true`` ever passes."""
    rng, log, out = generator("bench statistics", purpose), math.log(1 / level), np.zeros(runs, dtype=bool)
    up, down = np.log1p(PASS_BETS * bound / (1 - bound)), np.log1p(-PASS_BETS)
    for start in range(0, runs, 500):
        bad = (rng.random((min(500, runs - start), n)) < true).cumsum(1)[..., None]
        wealth = bad * down + (np.arange(1, n + 1)[None, :, None] - bad) * up + PASS_LOG_WEIGHTS
        top = wealth.max(-1)
        value = top + np.log(np.exp(wealth - top[..., None]).sum(-1))
        out[start : start + 500] = (value >= log).any(1)
    return out


def promotion() -> list[dict[str, Any]]:
    """A wrong pass in any of four attempts at promotion, and the chance of a right one at the first."""
    out, alpha, attempts, n = [], 0.01, 4, 400
    for true in (0.05, 0.06):
        wrong = np.zeros(RUNS, dtype=bool)
        for k in range(attempts):
            wrong |= passes(true, BOUND, error_share(alpha, k, attempts), n, RUNS, f"wrong {true} {k}")
        score = rate(int(wrong.sum()), RUNS)
        out.append(
            row(
                f"wrong pass in 4 attempts at promotion, limit 5%, truth {true:.0%}",
                score.value,
                goal=f"<= {alpha}",
                met=score.low <= alpha,
                seeds=RUNS,
                **shown(score),
            )
        )
    for bound in (0.05, 0.10):
        for true in (0.0, bound / 10, bound / 5, bound / 2):
            right = passes(true, bound, error_share(alpha, 0, attempts), n, 1000, f"right {bound} {true}")
            score = rate(int(right.sum()), 1000)
            name = f"passes at the first attempt with 400 prompts, limit {bound:.0%}, truth {true:.1%}"
            out.append(row(name, score.value, seeds=1000, **shown(score)))
    return out


# -- many constraints ----------------------------------------------------------------------------------------

CONSTRAINTS, BROKEN, EACH, FDR, REPORTS = 20, 6, 256, 0.05, 1000


def outcomes(dependence: str, rng: np.random.Generator) -> np.ndarray:
    """Bad outcomes [constraint, prompt] of one report; the last `BROKEN` constraints break a 5% limit.

    "shared": all constraints ask the same prompts, and a hard prompt is hard for all. "checkpoint": one draw
    makes all constraints of a checkpoint better or worse together, the sound ones up to their limit.
    """
    base = np.where(np.arange(CONSTRAINTS) < CONSTRAINTS - BROKEN, BOUND, 0.15)[:, None]
    own = rng.normal(size=(CONSTRAINTS, EACH))
    if dependence == "independent":
        return own < norm.ppf(base)
    if dependence == "shared":
        return math.sqrt(0.7) * rng.normal(size=(1, EACH)) + math.sqrt(0.3) * own < norm.ppf(base)
    return own < norm.ppf(base) if rng.random() < 0.5 else own < norm.ppf(base / 2)


def report_levels() -> list[dict[str, Any]]:
    """False discovery rate and power of three ways to read a report of twenty constraints.

    All three look after every 64 outcomes and keep the strongest evidence they saw, as people do; only the
    e-process may: what it had reached is not what it has.
    """
    out, sound = [], np.arange(CONSTRAINTS) < CONSTRAINTS - BROKEN
    for dependence in ("independent", "shared", "checkpoint"):
        rng = generator("bench statistics", "fdr", dependence)
        wrong: dict[str, list[float]] = {"e-BH": [], "BH of p-values, best look": [], "each at 5%": []}
        found: dict[str, list[float]] = {name: [] for name in wrong}
        for _ in range(REPORTS):
            bad = outcomes(dependence, rng).cumsum(1)
            looks = [64, 128, 192, 256]
            counts = bad[:, [k - 1 for k in looks]]
            e = np.exp(np.minimum([log_mean(stakes(c, EACH)) for c in counts[:, -1]], 27.6))
            p = binom.sf(counts - 1, looks, BOUND).min(1)
            rejected = {
                "e-BH": [int(i) for i in e_bh({str(i): float(v) for i, v in enumerate(e)}, FDR)],
                "BH of p-values, best look": np.flatnonzero(false_discovery_control(p) <= FDR).tolist(),
                "each at 5%": np.flatnonzero(p <= 0.05).tolist(),
            }
            for name, which in rejected.items():
                wrong[name].append(float(sound[which].sum()) / max(len(which), 1))
                found[name].append(float((~sound)[which].sum()) / BROKEN)
        for name, shares in wrong.items():
            score, power = bootstrap(shares, draws=400), bootstrap(found[name], draws=400)
            held = name == "e-BH"
            out.append(
                row(
                    f"false discovery rate of 20 constraints, {dependence}: {name}",
                    score.value,
                    goal=f"<= {FDR}" if held else None,
                    met=score.low <= FDR if held else None,
                    seeds=REPORTS,
                    broken_found=[power.value, power.low, power.high],
                    **shown(score),
                )
            )
    return out


def main() -> None:
    """Run everything and write the table."""
    same_as_the_product()
    write(
        "statistics",
        [*false_alarms(), *delays(), *samples_to_pass(), *promotion(), *report_levels()],
    )


if __name__ == "__main__":
    main()
