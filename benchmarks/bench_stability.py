"""What spoilt data cost with and without the guard, what the guard costs, and what clipping is worth.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_stability.py [--seeds 3] [--steps 300]

Small byte-level models on the packaged books, through the product's own loop. In each disturbed run several
batches are spoilt at random steps; the cost is the final validation loss over that of the undisturbed run of
the same seed. Nothing random but the seed: initial weights, batches and the steps that are spoilt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Quiet, row, write
from glasshouse.base.batch import Batch
from glasshouse.base.errors import Stopped
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.data import books
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import Loss, Settings, Stage, StageConfig, enter_run, environment, evaluate, run_stages
from glasshouse.train import load_weights as weights_of
from glasshouse.train.monitor import Monitor
from glasshouse.train.objective import TensorBatch, next_token, tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.stability import SIGMAS, WINDOW, Detector
from glasshouse.train.step import backward
from our_step import batch_of

POS, ROWS, SPOILT = 64, 8, 6
SMALL = GPTConfig(vocab_size=256, context=POS, d_model=64, n_layer=2, n_head=4, qk_norm=True)
PLAN = DataPlan(phases=(Phase(from_step=0, weights={"books": 1.0}),), digests={"books": "packaged"})
KINDS = ("random tokens", "shuffled targets", "NaN", "100x gradient")


@cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out bytes of the books."""
    joined = "\n".join(document.text for document in books.documents()).encode()
    ids = np.frombuffer(joined, dtype=np.uint8)
    return ids[: -len(ids) // 10], ids[-len(ids) // 10 :]


def windows(ids: np.ndarray, starts: np.ndarray) -> Batch:
    return batch_of(np.stack([ids[s : s + POS + 1] for s in starts]).astype(np.int64), "books")


def validation() -> list[Batch]:
    held = text()[1]
    starts = np.linspace(0, len(held) - POS - 1, 1024).astype(int)
    return [windows(held, part) for part in np.split(starts, 8)]


@dataclass(frozen=True)
class Disturbed:
    """A run and what is wrong with it. ``changes``: keys of the stage."""

    kinds: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def at(self, seed: int, steps: int) -> dict[int, str]:
        """Which steps are spoilt and how: never two neighbours, none before the window can judge."""
        if not self.kinds:
            return {}
        free = np.arange(64, steps - 20, 2)
        chosen = generator("spoilt", seed).permutation(free)[:SPOILT]
        return {int(step): self.kinds[i % len(self.kinds)] for i, step in enumerate(chosen)}


def spoil(batch: Batch, kind: str, seed: int, step: int) -> Batch:
    random = generator("spoil", seed, step)
    tokens, targets, weight = batch.tokens, batch.targets, batch.weight
    if kind == "random tokens":
        tokens = random.integers(0, 256, tokens.shape)
        targets = np.concatenate([tokens[:, 1:], random.integers(0, 256, (len(tokens), 1))], axis=1)
    elif kind == "shuffled targets":
        targets = random.permuted(targets, axis=1)
    elif kind == "NaN":
        weight = weight.copy()
        weight[0, 0] = np.nan
    return Batch(tokens, targets, weight, batch.shards, batch.n_bytes)


def train(run: Disturbed, seed: int, steps: int) -> dict[str, Any]:
    """Final validation loss, and what was seen and done at which steps (counted from 0)."""
    spoilt, calls = run.at(seed, steps), [0]
    train_ids = text()[0]

    def batch(step: int, plan: DataPlan) -> Batch:
        calls[0] = step
        starts = generator("rows", seed, step).integers(0, len(train_ids) - POS - 1, ROWS)
        good = windows(train_ids, starts)
        return spoil(good, spoilt[step], seed, step) if step in spoilt else good

    def objective(model: GPT, rows: TensorBatch, z_loss: float = 0.0) -> Loss:
        loss = next_token(model, rows, z_loss=z_loss)
        if spoilt.get(calls[0]) != "100x gradient":
            return loss
        still = loss.total.detach()
        return Loss(still + 100 * (loss.total - still), loss.parts, loss.metrics)

    shape = {"steps": steps, "batch_size": ROWS, "monitor_every": 0, "log_every": 1, "save_every": 50}
    config = StageConfig(**({"name": "grow", **shape} | run.changes))
    with tempfile.TemporaryDirectory() as folder:
        home = RunFolder(Path(folder) / "run").create()
        ledger = Ledger(home.ledger, signing_key())
        enter_run(ledger, recipe_digest="bench", environment=environment(1, "fp32", "fp32"))
        try:
            outcome = run_stages(
                lambda: GPT(SMALL).init_weights(seed),
                [Stage(config, batch, PLAN)],
                run=home,
                ledger=ledger,
                settings=Settings(threads=torch.get_num_threads()),
                objectives={"next_token": objective},
            )
        except Stopped:
            return {"loss": None, "spoilt": spoilt, "seen": {}, "plain": []}
        lines = [json.loads(line) for line in home.metrics.read_text().splitlines()]
        seen = {r["step"] - 1: r["action"] for r in lines if r["kind"] == "spike"}
        steps_seen = [(r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "train"]
        loss = evaluate(weights_of(outcome.checkpoint), validation())["loss"]
    return {"loss": loss, "spoilt": spoilt, "seen": seen, "plain": plain_rule(steps_seen)}


def contestants() -> dict[str, Disturbed]:
    """Every run of a seed, by name."""
    runs = {
        "undisturbed": Disturbed(),
        "undisturbed, unclipped": Disturbed((), {"clip_norm": None}),
        "undisturbed, z-loss 1e-4": Disturbed((), {"z_loss": 1e-4}),
    }
    for kind in KINDS:
        runs[f"{kind}, skip"] = Disturbed((kind,))
        if kind != "NaN":  # what is not finite is never applied
            runs[f"{kind}, applied"] = Disturbed((kind,), {"on_spike": "log"})
    runs["100x gradient, applied, unclipped"] = Disturbed(
        ("100x gradient",), {"on_spike": "log", "clip_norm": None}
    )
    runs["all four, skip"] = Disturbed(KINDS)
    runs["all four, applied"] = Disturbed(KINDS, {"on_spike": "log"})
    return runs


def plain_rule(steps: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """What the rule of mean and standard deviation of the last 128 losses and norms calls a spike."""
    found, past = [], np.zeros((0, 2))
    for i, pair in enumerate(steps):
        if None in pair:  # was not finite
            found.append(i)
            continue
        now, recent = np.array(pair, dtype=float), past[-WINDOW:]
        if len(recent) >= 32 and (now > recent.mean(axis=0) + SIGMAS * recent.std(axis=0)).any():
            found.append(i)
        past = np.vstack([past, now])
    return found


def costs(seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for name, run in contestants().items():
            found.setdefault(name, []).append(train(run, seed, steps))
            print(f"seed {seed}: {name}: {found[name][-1]['loss']}")
    base = [r["loss"] for r in found["undisturbed"]]

    def change(name: str) -> float:
        return statistics.mean(100 * (r["loss"] / b - 1) for r, b in zip(found[name], base, strict=True))

    each, rows = list(seeds), []
    rows.append(row("final validation loss, undisturbed (nats a byte)", statistics.mean(base), seeds=each))
    alarms = sum(len(r["seen"]) for name in found if name.startswith("undisturbed") for r in found[name])
    rows.append(row("false alarms in undisturbed runs", alarms, goal="0", met=alarms == 0, seeds=each))
    others = sum(len(set(r["seen"]) - set(r["spoilt"])) for n, rs in found.items() if "skip" in n for r in rs)
    rows.append(row("false alarms in disturbed runs (skip)", others, goal="0", met=others == 0, seeds=each))
    for name in (*KINDS, "all four"):
        runs = found[f"{name}, skip"]
        share = sum(s in r["seen"] for r in runs for s in r["spoilt"]) / sum(len(r["spoilt"]) for r in runs)
        plain = sum(s in r["plain"] for r in runs for s in r["spoilt"]) / sum(len(r["spoilt"]) for r in runs)
        about = {"peer": "mean + 6 deviations", "peer_value": plain, "goal": "all"}
        rows.append(row(f"{name}: share of batches caught", share, met=share == 1.0, seeds=each, **about))
        cost = change(f"{name}, skip")
        without = f"{name}, applied"
        rows.append(
            row(
                f"{name}: change of final loss, skipped (%)",
                cost,
                peer="applied" if without in found else None,
                peer_value=change(without) if without in found else None,
                goal="<= 1",
                met=cost <= 1.0,
                seeds=each,
            )
        )
    for name in ("undisturbed, unclipped", "undisturbed, z-loss 1e-4", "100x gradient, applied, unclipped"):
        spread = [100 * (r["loss"] / b - 1) for r, b in zip(found[name], base, strict=True)]
        rows.append(
            row(f"{name}: change of final loss (%)", statistics.mean(spread), seeds=each, each=spread)
        )
    return rows


def overhead(name: str, config: GPTConfig, rows: int, pos: int, repeats: int = 5) -> list[dict[str, Any]]:
    """The guard's and the monitors' share of the time of a step, interleaved with steps."""
    model = GPT(config).init_weights(0)
    stage = StageConfig(name="grow", steps=10, batch_size=rows)
    optimizers, random = Optimizers(model, stage, "fp32"), np.random.default_rng(0)
    ids = random.integers(0, config.vocab_size, (rows, pos))
    batch = tensors(Batch(ids, ids, np.ones(ids.shape, dtype=np.float32), ("x",), 1))
    detector = Detector(optimizers.names)
    for _ in range(WINDOW + 1):
        detector.look(
            3 + 0.01 * random.normal(), np.exp(0.1 * random.normal(size=len(optimizers.names))).tolist()
        )
    took: dict[str, list[float]] = {"step": [], "guard": [], "look": []}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        took[what].append(time.perf_counter() - began)
        return result

    def step() -> list[float]:
        optimizers.zero_grad()
        backward(model, next_token, batch, "fp32")
        norms = optimizers.norms()
        optimizers.clip(float(np.linalg.norm(norms)))
        optimizers.step(0.1)
        return norms

    with Quiet() as quiet:
        for turn in range(repeats + 1):
            norms = timed("step", step)
            for _ in range(20):
                timed("guard", lambda norms=norms: detector.look(3.0, norms))
            monitor = Monitor(model)
            timed(
                "look",
                lambda monitor=monitor: (monitor.before(next_token, batch, "fp32", 1.0), monitor.after()),
            )
            if turn == 0:
                took = {key: [] for key in took}
    step_s, guard_s, look_s = (statistics.median(took[key]) for key in ("step", "guard", "look"))
    guard, looks = 100 * guard_s / step_s, 100 * look_s / (stage.monitor_every * step_s)
    about = {"goal": "<= 1", "step_ms": 1e3 * step_s, "foreign": quiet.foreign}
    return [
        row(f"{name}: guard's share of a step (%)", guard, met=guard <= 1, **about),
        row(
            f"{name}: monitors' share, every {stage.monitor_every} steps (%)", looks, met=looks <= 1, **about
        ),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=300)
    asked = options.parse_args()
    os.environ["GLASSHOUSE_HOME"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    rows = costs(range(asked.seeds), asked.steps)
    wide = GPTConfig(vocab_size=65, context=256, d_model=384, n_layer=6, n_head=6)
    rows += overhead("2 layers of 64, 8 x 64 tokens", SMALL, ROWS, POS, repeats=30)
    rows += overhead("6 layers of 384, 16 x 256 tokens", wide, 16, 256)
    write("stability", rows)


if __name__ == "__main__":
    main()
