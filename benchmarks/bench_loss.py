"""Time to loss: how soon our recipe reaches the final loss of nanoGPT's README recipe for CPUs.

Contestants take turns, every run in a process of its own: nanoGPT's train.py from the folder that the user
names, then a whole run of ours through the trainer. Both are scored by the same windows of held-out text.
Time is training alone for nanoGPT (its own step times), and everything after import for ours. A run during
which others took more than a tenth of the machine is done again. Finished runs are kept in ``--raw``.

    python benchmarks/bench_loss.py --nanogpt ~/nanoGPT --data ~/data

``--data`` holds tinyshakespeare/input.txt and books/*.jsonl.gz. Results: benchmarks/results/loss.json.
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait take the core from the one that has work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Quiet, row, write
from loss_tasks import TASKS, Recipe, train_ours
from nanogpt import train_peer
from raw import Raw

SHAPE: dict[str, Any] = {
    **{"d_model": 128, "n_layer": 4, "n_head": 4, "qk_norm": True, "value_residual": True},
    **{"norm": "rms", "position": "rotary", "mlp": "plain", "activation": "relu2"},
}
STAGE: dict[str, Any] = {
    **{"batch_size": 16, "muon_lr": 0.02, "adam_lr": 0.02, "weight_decay": 0.1},
    **{"warmup_share": 0.05, "decay_share": 0.95, "decay_shape": "cosine", "final_lr_share": 0.1},
}
RECIPES = {
    "shakespeare": Recipe(SHAPE, {**STAGE, "steps": 256}),
    "books": Recipe(SHAPE, {**STAGE, "steps": 256}),
}
ATTEMPTS = 4  # at a run that others disturb
GOAL = "<= 1/3 of the time, no higher loss"


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    task = TASKS[arguments.task](arguments.data)
    if arguments.one == "nanoGPT":
        return train_peer(arguments.nanogpt, task, arguments.seed, arguments.iters)
    return train_ours(RECIPES[arguments.task], task, arguments.seed)


def apart(contestant: str, task: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, repeated while others disturb it."""
    command = [sys.executable, __file__, "--one", contestant, "--task", task, "--seed", str(seed)]
    command += ["--nanogpt", str(arguments.nanogpt), "--data", str(arguments.data)]
    command += ["--iters", str(arguments.iters)]
    for _ in range(ATTEMPTS):
        with Quiet() as quiet:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{contestant} failed:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        found["foreign"] = None if quiet.foreign is None else round(quiet.foreign, 3)
        said = f"{task}, seed {seed}, {contestant}: {found['bpb']:.4f} bits a byte"
        print(f"{said} in {found['seconds']:.1f} s (others {found['foreign']})", flush=True)
        if arguments.keep_disturbed or not quiet.disturbed:
            return found
    raise SystemExit(f"others took more than a tenth of the machine in {ATTEMPTS} runs: try when it is idle")


def rows(task: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of one task: the time, the loss, and whether every seed of ours met the goal."""
    peers = {r["seed"]: r for r in runs if r["task"] == task and r["contestant"] == "nanoGPT"}
    ours = {r["seed"]: r for r in runs if r["task"] == task and r["contestant"] == "glasshouse"}
    seeds = sorted(peers.keys() & ours.keys())
    if not seeds:
        return []
    ratios = [ours[s]["seconds"] / peers[s]["seconds"] for s in seeds]
    # The worst of ours against the best of theirs, so that no pairing of seeds matters.
    reached = max(ours[s]["loss"] for s in seeds) <= min(peers[s]["loss"] for s in seeds)
    met = reached and max(ratios) <= 1 / 3
    per_seed = {
        name: [{k: r[s][k] for k in ("seed", "seconds", "loss", "bpb")} for s in seeds]
        for name, r in (("ours", ours), ("nanoGPT", peers))
    }

    def pair(metric: str, key: str, **more: Any) -> dict[str, Any]:
        mine, theirs = ([r[s][key] for s in seeds] for r in (ours, peers))
        spread = {"range": [min(mine), max(mine)], "peer_range": [min(theirs), max(theirs)]}
        about = {"peer": "nanoGPT, README recipe", "seeds": len(seeds), **spread, **more}
        value, peer_value = (round(statistics.median(v), 4) for v in (mine, theirs))
        return row(f"{task}: {metric}", value, peer_value=peer_value, **about)

    share = row(
        f"{task}: share of nanoGPT's time to its final loss",
        round(statistics.median(ratios), 4),
        peer="nanoGPT, README recipe",
        peer_value=1.0,
        goal=GOAL,
        met=met,
        seeds=len(seeds),
        range=[round(min(ratios), 4), round(max(ratios), 4)],
        runs=per_seed,
    )
    return [
        share,
        pair("training seconds", "seconds"),
        pair("held-out nats a character", "loss", met=reached, goal="worst of ours <= best of theirs"),
        pair("held-out bits a byte", "bpb"),
        pair("characters trained on", "tokens"),
        pair("parameters", "parameters"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--task", choices=list(TASKS), help="default: all")
    parser.add_argument(
        "--iters", type=int, default=2000, help="nanoGPT's updates; the README's recipe: 2000"
    )
    parser.add_argument("--raw", type=Path, default=Path("runs/bench/loss.jsonl"))
    parser.add_argument("--keep-disturbed", action="store_true", help="take timings of a busy machine")
    parser.add_argument("--one", choices=["nanoGPT", "glasshouse"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments)))
        return
    raw = Raw(arguments.raw, ("task", "seed", "contestant"))
    tasks = [arguments.task] if arguments.task else list(TASKS)
    for seed in range(arguments.seeds):
        for task in tasks:
            for contestant in ("nanoGPT", "glasshouse"):
                if not raw.has(task, seed, contestant):
                    raw.add(apart(contestant, task, seed, arguments))
    write("loss", [r for task in tasks for r in rows(task, raw.runs)])


if __name__ == "__main__":
    main()
