"""Fit the dial's rules (`glasshouse.train.scaling`) on small models, with intervals.

One sweep per number at four places (depth, tokens per parameter), around a common centre, on the packed
books; then a parabola through each sweep in the logarithm of the number, and power laws through their minima.
Noise is the deviation between seeds at the centres; intervals are from 2,000 refits with that noise added to
every loss. Loss only, so a busy machine does not matter. Finished runs are kept in ``--raw``.

Results: benchmarks/results/scaling.json.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from common import row, write
from glasshouse.model import GPTConfig
from glasshouse.train import Stage, StageConfig, evaluate
from glasshouse.train.scaling import HEAD_WIDTH, matrix_parameters, shape
from loss_tasks import run_stage, score
from packed_books import CONTEXT, Books, books_parser
from raw import Raw

PLACES = ((2, 0.5, 8), (3, 0.5, 8), (4, 0.5, 16), (2, 4.0, 16))  # depth, tokens per parameter, rows
CENTRE = {"muon_lr": 0.01, "adam_lr": 0.03}
MUON_LRS, ADAM_LRS = (0.005, 0.01, 0.02), (0.015, 0.03, 0.06)
DECAYS = (0.0, 0.1, 0.3, 1.0)
BUDGETS = {7e11: (1, 2, 3, 4), 4e12: (2, 3, 4, 5)}  # operations of 6 N D: which depths share them
SEEDS = (0, 1, 2)
FITS = 2000
UNIT = 1024  # tokens in the batch for which rates are stated
NAMES = {"muon_lr": "muon_lr", "adam_lr": "adam_lr", "rows": "tokens in a batch"}
REFERENCES = {"N": "N = 1e6", "D": "D = 1e6", "width": "width 128"}
Run = dict[str, Any]


def sweeps() -> list[Run]:
    """Every run, those that several fits share once."""
    runs: list[Run] = []
    for depth, ratio, rows in PLACES:
        place: Run = {"depth": depth, "ratio": ratio, "rows": rows, "weight_decay": 0.1, "seed": 0, **CENTRE}
        runs += [{**place, "seed": seed} for seed in (SEEDS if depth < 4 else SEEDS[:1])]
        runs += [{**place, "muon_lr": lr} for lr in MUON_LRS]
        runs += [{**place, "adam_lr": lr} for lr in ADAM_LRS]
        for factor in (0.5, 2.0):  # rates follow the batch by its square root (Malladi et al. 2022)
            rates = {k: v * math.sqrt(factor) for k, v in CENTRE.items()}
            runs.append({**place, **rates, "rows": int(rows * factor)})
        if depth < 4:
            runs += [{**place, "weight_decay": decay} for decay in DECAYS]
    for budget, depths in BUDGETS.items():
        for depth in depths:
            ratio = round(budget / 6 / matrix_parameters(model(depth)) ** 2, 4)
            runs.append({"depth": depth, "ratio": ratio, "rows": 8, "weight_decay": 0.1, "seed": 0, **CENTRE})
    return list({tuple(sorted(run.items())): run for run in runs}.values())


def model(depth: int, vocab_size: int = 2048, **changes: Any) -> GPTConfig:
    """The dial's shape of a depth."""
    width = changes.pop("d_model", shape(depth)["d_model"])
    return GPTConfig(
        vocab_size=vocab_size,
        context=CONTEXT,
        n_layer=depth,
        d_model=width,
        n_head=width // HEAD_WIDTH,
        qk_norm=True,
        **changes,
    )


KEY = ("depth", "ratio", "rows", "muon_lr", "adam_lr", "weight_decay", "seed")


def measure(run: Run, books: Books, held: list[Any], threads: int) -> Run:
    """One run: its held-out bits per byte."""
    config = model(run["depth"], books.tok.vocab_size)
    tokens = run["ratio"] * matrix_parameters(config)
    steps = max(10, round(tokens / run["rows"] / CONTEXT))
    stage = StageConfig(
        name="pretrain",
        steps=steps,
        batch_size=run["rows"],
        muon_lr=run["muon_lr"],
        adam_lr=run["adam_lr"],
        weight_decay=run["weight_decay"],
        warmup_share=0.05,
        decay_share=0.5,
        log_every=50,
    )
    batches = books.batches(run["seed"], run["rows"])
    found, trained = run_stage(config, Stage(stage, batches, books.plan), run["seed"], "bf16", threads)
    torch.set_num_threads(threads)
    scored = evaluate(trained, held)
    about = {"N": matrix_parameters(config), "tokens": steps * run["rows"] * CONTEXT}
    return {**run, **about, **found, **score(scored["loss"], scored["n_bytes"], scored["targets"])}


def minimum(points: list[tuple[float, float]]) -> float:
    """Where the parabola through (log number, loss) is lowest, kept within a factor of two of what was tried.

    The end that is lower when the parabola has no minimum.
    """
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    a, b, _ = np.polyfit(x, y, 2)
    best = -b / (2 * a) if a > 0 else x[int(np.argmin(y))]
    return float(np.clip(best, x.min() - math.log(2), x.max() + math.log(2)))


def sweep_points(runs: list[Run], place: tuple[int, float, int], key: str) -> list[tuple[float, int]]:
    """(log value, index of the run) of a sweep of ``key`` at a place."""
    depth, ratio, rows = place
    found = []
    for i, run in enumerate(runs):
        if (run["depth"], run["ratio"], run["seed"]) != (depth, ratio, 0):
            continue
        factor = math.sqrt(run["rows"] / rows)
        here: dict[str, float] = {"rows": rows, "weight_decay": 0.1, **CENTRE}
        if key == "rows":
            here |= {"rows": run["rows"]} | {k: v * factor for k, v in CENTRE.items()}
        else:
            here[key] = run[key]
        if all(math.isclose(run[k], v) for k, v in here.items()) and run[key] > 0:
            found.append((math.log(run[key] * (CONTEXT if key == "rows" else 1)), i))
    return found


def power_laws(runs: list[Run], loss: np.ndarray) -> dict[str, float]:
    """Every fitted number for one set of losses: optima, their power laws, the ratio at equal compute.

    Rates are stated for a batch of `UNIT` tokens, to which their square-root rule takes them.
    """
    found: dict[str, float] = {}
    for key in NAMES:
        rows = []
        for place in PLACES:
            points = sweep_points(runs, place, key)
            if len(points) < 3:
                continue
            best = minimum([(x, loss[i]) for x, i in points])
            if key != "rows":
                best -= 0.5 * math.log(place[2] * CONTEXT / UNIT)
            run = runs[points[0][1]]
            rows.append([math.log(v) for v in (run["N"] / 1e6, run["tokens"] / 1e6, place[0] / 4)] + [best])
            found[f"{NAMES[key]} at depth {place[0]}, {place[1]} tokens a parameter"] = math.exp(best)
        *known, best_of = (np.array(column) for column in zip(*rows, strict=True))
        found[f"{NAMES[key]}: mean"] = float(np.exp(best_of.mean()))
        # One exponent at a time: N and D move together in these sweeps, so a fit of both would tell them
        # apart only by its noise.
        for name, x in zip(("N", "D", "width"), known, strict=True):
            slope, at = np.polyfit(x, best_of, 1)
            found |= {f"{NAMES[key]}: exponent of {name}": float(slope)}
            found |= {f"{NAMES[key]}: at {REFERENCES[name]}": math.exp(at)}
    scales = []
    for place in PLACES[:2] + PLACES[3:]:
        points = sweep_points(runs, place, "weight_decay")
        if len(points) >= 3:
            run = runs[points[0][1]]
            best = minimum([(x, loss[i]) for x, i in points])
            scales.append(best + math.log(run["muon_lr"] * run["steps"]))
            where = f"depth {place[0]}, {place[1]} tokens a parameter"
            found[f"weight decay at {where}"] = math.exp(best)
    if scales:
        found["weight decay x muon_lr x steps: mean"] = math.exp(sum(scales) / len(scales))
    for budget, depths in BUDGETS.items():
        points = []
        for depth in depths:
            ratio = round(budget / 6 / matrix_parameters(model(depth)) ** 2, 4)
            at = [i for i, r in enumerate(runs) if r["depth"] == depth and r["ratio"] == ratio]
            points += [(math.log(ratio), loss[i]) for i in at]
        if len(points) >= 3:
            found[f"tokens a parameter at {budget:.0e} operations"] = math.exp(minimum(points))
    return found


def noise(runs: list[Run]) -> float:
    """Deviation of the loss between seeds at the centres, pooled."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        groups.setdefault(tuple(run[k] for k in KEY[:-1]), []).append(run["bpb"])
    several = [np.var(g, ddof=1) for g in groups.values() if len(g) > 1]
    return float(np.sqrt(np.mean(several))) if several else math.nan


def main() -> None:
    parser = books_parser(__doc__, "runs/bench/scaling.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    books, raw = Books(arguments.data, arguments.cache), Raw(arguments.raw, KEY)
    held = books.held_out()
    for run in sweeps():
        if not raw.has(*(run[k] for k in KEY)):
            raw.add(measure(run, books, held, arguments.threads))
            print({k: raw.runs[-1][k] for k in (*KEY, "bpb", "seconds")}, flush=True)
    runs, deviation = raw.runs, noise(raw.runs)
    loss = np.array([run["bpb"] for run in runs])
    random = np.random.Generator(np.random.PCG64(0))
    fits = [power_laws(runs, loss + deviation * random.standard_normal(len(loss))) for _ in range(FITS)]
    rows = [row("deviation of bits a byte between seeds", round(deviation, 5), seeds=len(SEEDS))]
    for name, value in power_laws(runs, loss).items():
        low, high = np.percentile([fit[name] for fit in fits], [2.5, 97.5])
        rows.append(row(name, float(f"{value:.4g}"), range=[float(f"{low:.4g}"), float(f"{high:.4g}")]))
    for decay in DECAYS:
        group = [r["bpb"] for r in runs if r["weight_decay"] == decay and same_but_decay(r)]
        rows.append(row(f"bits a byte with weight decay {decay}", round(float(np.mean(group)), 5)))
    write("scaling", rows)


def same_but_decay(run: Run) -> bool:
    """Whether a run is at a centre at which weight decay was swept."""
    at = (run["depth"], run["ratio"], run["rows"])
    return (
        run["depth"] < 4 and at in PLACES and run["seed"] == 0 and all(run[k] == v for k, v in CENTRE.items())
    )


if __name__ == "__main__":
    main()
