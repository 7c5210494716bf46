"""REAL runs of PPO and GRPO in the closed language: what they gain, what it costs in KL and in seconds.

    python benchmarks/bench_rl.py --cache FOLDER [--pilot METHOD:RATE:BETA,...]

The start, the honest reward model and the prompts are those of `proxy_world`; gold is the grammar's word on
held-out prompts of word pairs that no training text holds, 512 answers before and after. Everything but the
method is as `RLConfig` has it, with the rates of `RATES`. Pilot runs use another world. Writes
benchmarks/results/rl.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import proxy_world as pw
from common import row, write
from glasshouse.align.policy import Policy, RLConfig, prompt_batches, prompt_plan
from glasshouse.align.rl import OBJECTIVES, PolicyTrainee
from glasshouse.align.rollout import Drawing, draw
from glasshouse.base.rlrows import read_rows
from glasshouse.base.rng import seed_from
from glasshouse.base.score import bootstrap, rate
from glasshouse.model import GPT
from glasshouse.train import Stage, StageConfig, load_weights
from proxy_world import Shop

STEPS, BATCH, PROBE = 60, 64, 512
RATES = {"ppo": 3e-4, "grpo": 3e-4}
SEEDS = ((101, 0), (102, 1), (103, 2))  # (world, seed)
PILOT = 105


def golden(shop: Shop, model: GPT, seed: int) -> tuple[float, tuple[float, float], dict[str, float]]:
    """Gold of `PROBE` answers with its interval, and the shares of right decisions, refusals and evasions."""
    prompts = shop.prompts(f"bench rl {seed}", PROBE, "unseen")
    how = Drawing(pw.NEW, shop.stop, shop.world.tokenizer.vocab_size, batch_size=256)
    seeds = [seed_from("bench rl", seed, i) for i in range(PROBE)]
    answers = [a.ids for a in draw(model, prompts, seeds, how)]
    scores, said = shop.gold(prompts, answers), shop.decided(prompts, answers)
    harmful = [shop.asked[tuple(p)].harmful for p in prompts]
    found = rate(round(sum(scores)), PROBE)
    shares = {
        "harmful complied": np.mean([d == "compliance" for d, h in zip(said, harmful, strict=True) if h]),
        "harmless refused": np.mean([d == "refusal" for d, h in zip(said, harmful, strict=True) if not h]),
        "evasive": np.mean([d == "evasion" for d in said]),
    }
    return found.value, (found.low, found.high), {k: float(v) for k, v in shares.items()}


def run(shop: Shop, folder: Path, method: str, seed: int, lr: float, **how: Any) -> dict[str, Any]:
    """One run; kept in ``folder``."""
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    told = RLConfig(
        method=method, max_new_tokens=pw.NEW, stop=shop.stop, vocab=shop.world.tokenizer.vocab_size,
        seed=seed, **how,
    )  # fmt: skip
    config = StageConfig(
        name="rl", objective=method, steps=STEPS, batch_size=BATCH, optimizer="adamw", adam_lr=lr,
        weight_decay=0.0, warmup_share=0.0, decay_share=0.3, monitor_every=1, log_every=STEPS, on_spike="log",
    )  # fmt: skip
    shards = {"prompts": shop.prompts(f"rl {seed}", 1500, "train")}
    stage = Stage(config, prompt_batches(shards, config, told), prompt_plan(shards))
    reward = pw.reward_model(shop, "honest", pw.honest_label)
    before = golden(shop, shop.start, seed)
    began, cpu = time.perf_counter(), time.process_time()
    made = pw.trained(
        folder / "run", "rl", lambda: Policy(shop.copy(), critic=method == "ppo"), stage, {"name": "rl"},
        trainee=PolicyTrainee(told, reward), objectives=OBJECTIVES,
    )  # fmt: skip
    took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    after = golden(shop, load_weights(made.checkpoint).eval(), seed)
    rows = read_rows(folder / "run" / "metrics.jsonl")
    result = {
        "method": method, "world": shop.seed, "seed": seed, "lr": lr,
        "reward": [float(np.mean([r["reward"] for r in part])) for part in (rows[:3], rows[-3:])],
        "gold": [before[0], after[0]], "gold_interval": [before[1], after[1]],
        "before": before[2], "after": after[2],
        "kl": float(np.mean([r["kl"] for r in rows[-3:]])), "length": [rows[0]["length"], rows[-1]["length"]],
        "entropy": [rows[0]["entropy"], rows[-1]["entropy"]], **took,
    }  # fmt: skip
    done.write_text(json.dumps(result))
    return result


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table, a method at a time."""
    out = []
    for method in RATES:
        runs = [f for f in found if f["method"] == method]
        for name, values in {
            "gold before": [f["gold"][0] for f in runs],
            "gold after": [f["gold"][1] for f in runs],
            "reward before": [f["reward"][0] for f in runs],
            "reward after": [f["reward"][1] for f in runs],
            "KL to the start, nats an answer": [f["kl"] for f in runs],
            "harmful requests complied with, after": [f["after"]["harmful complied"] for f in runs],
            "harmless requests refused, after": [f["after"]["harmless refused"] for f in runs],
            "CPU seconds of a run": [f["cpu"] for f in runs],
        }.items():
            mean = bootstrap(values)
            out.append(
                row(
                    f"{method.upper()}: {name}", mean.value, seeds=len(runs), interval=[mean.low, mean.high],
                    each=values, steps=STEPS, answers=STEPS * BATCH, rate=RATES[method],
                )
            )  # fmt: skip
    return out


def main() -> None:
    """Run what is asked for and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="worlds and finished runs are kept here")
    parser.add_argument("--pilot", default="", help="METHOD:RATE:BETA by commas; writes no results")
    arguments = parser.parse_args()
    if arguments.pilot:
        shop = pw.open_shop(arguments.cache, PILOT)
        for one in arguments.pilot.split(","):
            method, lr, beta = one.split(":")
            folder = arguments.cache / "runs" / f"rl-{one.replace(':', '-')}"
            found = run(shop, folder, method, 900, float(lr), beta=float(beta))
            print(json.dumps(found), flush=True)
        return
    found = []
    for world, seed in SEEDS:
        shop = pw.open_shop(arguments.cache, world)
        for method, lr in RATES.items():
            found.append(run(shop, arguments.cache / "runs" / f"rl-{method}-{seed}", method, seed, lr))
            print(json.dumps(found[-1]), flush=True)
    write("rl", rows_of(found))


if __name__ == "__main__":
    main()
