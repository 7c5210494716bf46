"""bf16 against fp32: is the final held-out loss the same within the noise between seeds?

The recipe of `bench_loss` on both tasks, shortened, with equal seeds and batches in both precisions. Loss
only: a busy machine does not matter. Results: benchmarks/results/precision.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from ablations import interval
from bench_loss import RECIPES
from common import row, write
from loss_tasks import TASKS, train_ours
from raw import Raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=Path("runs/bench/precision.jsonl"))
    arguments = parser.parse_args()
    raw = Raw(arguments.raw, ("task", "seed", "dtype"))
    for name, make in TASKS.items():
        task, recipe = make(arguments.data), RECIPES[name]
        recipe = replace(recipe, stage={**recipe.stage, "steps": arguments.steps}, threads=arguments.threads)
        for seed in range(arguments.seeds):
            for dtype in ("fp32", "bf16"):
                if not raw.has(name, seed, dtype):
                    raw.add(train_ours(replace(recipe, precision=dtype), task, seed))
                    print(f"{name}, seed {seed}, {dtype}: {raw.runs[-1]['loss']:.4f}", flush=True)
    rows = []
    for name in TASKS:
        loss = {(r["seed"], r["dtype"]): r["loss"] for r in raw.runs if r["task"] == name}
        seeds = sorted({seed for seed, _ in loss})
        shift, half = interval([loss[s, "bf16"] - loss[s, "fp32"] for s in seeds])
        full = [loss[s, "fp32"] for s in seeds]
        noise = statistics.stdev(full) if len(full) > 1 else None
        rows.append(
            row(
                f"{name}: held-out loss in bf16",
                round(statistics.fmean(loss[s, "bf16"] for s in seeds), 4),
                peer="fp32",
                peer_value=round(statistics.fmean(full), 4),
                goal="mean difference below the standard deviation between seeds",
                met=noise is not None and abs(shift) <= noise,
                seeds=len(seeds),
                difference=round(shift, 5),
                half_width=round(half, 5),
                seed_deviation=None if noise is None else round(noise, 5),
            )
        )
    write("precision", rows)


if __name__ == "__main__":
    main()
