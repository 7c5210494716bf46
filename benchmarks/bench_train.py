"""Training speed: tokens per second, and its share of what this machine's matrix products reach.

Peak and training take turns, with the same threads and precision, so that a busy machine slows both alike.
Rows {metric, value, peer, peer_value, goal, met, seeds, machine, commit} go to benchmarks/results/train.json.
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait cost several-fold as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glasshouse.base.atomic import write_json
from glasshouse.base.batch import Batch
from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig
from glasshouse.train.config import StageConfig
from glasshouse.train.identity import cpu_name
from glasshouse.train.objective import autocast, next_token, tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.precision import choose_dtype, choose_threads, muon_dtype
from glasshouse.train.throughput import flops_per_token, gemm_peak

RESULTS = Path(__file__).parent / "results" / "train.json"
MODEL = GPTConfig(vocab_size=2048, context=128, d_model=192, n_layer=4, n_head=6)
ROWS, POS = 16, 128


def batch(seed: int, step: int) -> Batch:
    """Random tokens: how fast a step is does not depend on what the tokens say."""
    ids = generator("bench", seed, step).integers(0, MODEL.vocab_size, size=(ROWS, POS + 1))
    weight = np.ones((ROWS, POS), dtype=np.float32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weight, ("random",), ids.size)


def measure(seed: int, steps: int, dtype: str) -> tuple[float, float]:
    """Median tokens per second of whole steps (batch, gradient, clipping, update), and the best peak."""
    model = GPT(MODEL).init_weights(seed)
    optimizers = Optimizers(model, StageConfig(name="bench", steps=steps, batch_size=ROWS), muon_dtype())
    took, peaks = [], []
    for step in range(steps):
        began = time.perf_counter()
        with autocast(dtype):
            loss = next_token(model, tensors(batch(seed, step)))
        optimizers.zero_grad()
        loss.total.backward()
        optimizers.clip()
        optimizers.step(1.0)
        took.append(time.perf_counter() - began)
        if step % 5 == 0:
            peaks.append(gemm_peak(dtype, seconds=0.2))
    return ROWS * POS / statistics.median(took[1:]), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = GPT(MODEL).init_weights(0)
    threads = choose_threads("auto", model, batch(0, 0))
    torch.set_num_threads(int(threads.value))
    dtype = choose_dtype("auto", model, batch(0, 0))
    runs = [measure(seed, arguments.steps, str(dtype.value)) for seed in range(arguments.seeds)]
    speed = statistics.median(tokens for tokens, _ in runs)
    share = statistics.median(tokens * flops_per_token(model, POS) / peak for tokens, peak in runs)
    where = (
        f"{cpu_name()}, {threads.value} of {os.cpu_count()} threads, {dtype.value}, torch {torch.__version__}"
    )
    rows: list[dict[str, Any]] = []
    for metric, value in [
        ("training tokens per second", round(speed)),
        ("share of GEMM peak", round(share, 3)),
    ]:
        print(f"{metric}: {value} ({where})")
        empty = {"peer": None, "peer_value": None, "goal": None, "met": None}
        row = {"metric": metric, "value": value, **empty, "seeds": arguments.seeds}
        rows.append(row | {"machine": where, "commit": commit()})
    print(f"threads: {threads.why}; precision: {dtype.why}")
    write_json(RESULTS, rows)
    print(f"wrote {RESULTS}: {len(json.dumps(rows))} bytes")


def commit() -> str | None:
    """The commit that was measured, "-dirty" if the tree has changes, None outside git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
