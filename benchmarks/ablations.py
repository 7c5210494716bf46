"""What every part of our recipe is worth: one change at a time, the same seeds, paired differences.

Character-level books, 4 layers, 4 heads, width 128, 240 updates of 16 x 64 characters: ten seconds a run.
Loss only, so a busy machine does not matter. Every finished run is a line of ``--raw``; runs in it are not
repeated. Results: benchmarks/results/ablations.json, in nats a character (positive: the change is worse).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import row, write
from glasshouse.model import GPT
from loss_tasks import Recipe, books, train_ours
from raw import Raw

MODEL: dict[str, Any] = {
    **{"d_model": 128, "n_layer": 4, "n_head": 4, "qk_norm": True, "value_residual": True},
    **{"norm": "rms", "position": "rotary", "mlp": "plain", "activation": "relu2", "tied": True},
}
STAGE: dict[str, Any] = {
    **{"steps": 240, "batch_size": 16, "muon_lr": 0.02, "adam_lr": 0.02, "weight_decay": 0.1},
    **{"warmup_share": 0.05, "decay_share": 0.5, "log_every": 40},
}
# Student's t, 97.5 %, by degrees of freedom: differences of a handful of seeds.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Arm:
    """One change of the recipe."""

    model: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    init: Callable[[GPT, int], None] | None = None


def gpt2_init(model: GPT, seed: int) -> None:
    """Normal, std 0.02 for matrices, divided by sqrt(2 n_layer) where they write to the stream (GPT-2)."""
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02
            if name.endswith(("o.weight", "down.weight")):
                std /= math.sqrt(2 * model.config.n_layer)
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=random) * std)


CONSTANT = {"decay_share": 0.0}
ARMS = {
    "recipe": Arm(),
    "learned positions": Arm({"position": "learned"}),
    "LayerNorm": Arm({"norm": "layer"}),
    "no QK-norm": Arm({"qk_norm": False}),
    "gated SiLU, equal parameters": Arm({"mlp": "gated", "activation": "silu"}),
    "GELU": Arm({"activation": "gelu"}),
    "no value residual": Arm({"value_residual": False}),
    "AdamW, rate 0.003": Arm(stage={"optimizer": "adamw", "adam_lr": 0.003}),
    "AdamW, rate 0.006": Arm(stage={"optimizer": "adamw", "adam_lr": 0.006}),
    "AdamW, rate 0.0015": Arm(stage={"optimizer": "adamw", "adam_lr": 0.0015}),
    "cosine over the whole run": Arm(
        stage={"decay_share": 0.95, "decay_shape": "cosine", "final_lr_share": 0.1}
    ),
    "linear decay over the whole run": Arm(stage={"decay_share": 0.95}),
    "GPT-2 initialisation": Arm(init=gpt2_init),
    "logit soft-cap 15": Arm({"logit_softcap": 15.0}),
    "untied head": Arm({"tied": False}),
    "mean of the last 10 %, with decay": Arm(stage={"average_share": 0.1}),
    "constant rate, no average": Arm(stage=CONSTANT),
    "constant rate, mean of the last 25 %": Arm(stage={**CONSTANT, "average_share": 0.25}),
    "no weight decay": Arm(stage={"weight_decay": 0.0}),
    "no clipping": Arm(stage={"clip_norm": None}),
    "twice the batch, half the steps": Arm(stage={"batch_size": 32, "steps": 120}),
    "half the batch, twice the steps": Arm(stage={"batch_size": 8, "steps": 480}),
}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); infinite for one value."""
    if len(values) < 2:
        return values[0], math.inf
    half = T[min(len(values) - 1, 9)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with books/*.jsonl.gz")
    parser.add_argument("--raw", type=Path, default=Path("runs/bench/ablations.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    raw = Raw(arguments.raw, ("arm", "seed"))
    task = books(arguments.data)
    for seed in range(arguments.seeds):
        for name, arm in ARMS.items():
            if raw.has(name, seed):
                continue
            recipe = Recipe(
                MODEL | arm.model, STAGE | arm.stage, threads=arguments.threads, change_init=arm.init
            )
            found = {"arm": name, **train_ours(recipe, task, seed)}
            raw.add(found)
            print(f"{name}, seed {seed}: {found['loss']:.4f} in {found['seconds']:.1f} s", flush=True)
    write("ablations", table(raw.runs))


def table(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: the mean loss and its paired difference from the recipe, with a 95 % interval."""
    loss = {(d["arm"], d["seed"]): d["loss"] for d in done}
    base = {seed: value for (arm, seed), value in loss.items() if arm == "recipe"}
    rows = []
    for name in ARMS:
        seeds = sorted(seed for arm, seed in loss if arm == name and seed in base)
        if not seeds:
            continue
        mean = statistics.fmean(loss[name, s] for s in seeds)
        shift, half = interval([loss[name, s] - base[s] for s in seeds])
        more = {} if name == "recipe" else {"difference": round(shift, 4), "half_width": round(half, 4)}
        rows.append(row(f"held-out loss: {name}", round(mean, 4), seeds=len(seeds), **more))
    return rows


if __name__ == "__main__":
    main()
