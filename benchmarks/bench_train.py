"""Training speed beside nanoGPT, Hugging Face and llm.c: whole steps, taking turns in one process.

    make bench-train NANOGPT=/path/to/nanoGPT LLMC=/path/to/llm.c

Every step is batch -> gradient -> clipping -> AdamW on the same random tokens and shape. Ours is the code of
the training loop. The peak of matrix products is measured between the turns, and a run in which other
processes took more than a tenth of the machine is thrown away. Operations per token are 6 N + 12 L d T with
each contestant's own N, so that "share of peak" means the same for all.
Prints tables and writes benchmarks/results/train.json.
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait cost several-fold as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peers_train
from common import FOREIGN_LIMIT, Quiet, row, write
from glasshouse.base.batch import Batch
from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.compiled import compile_blocks
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import next_token, tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.step import backward
from glasshouse.train.throughput import gemm_peak

SHAPES: dict[str, dict[str, int]] = {
    "A": {"d_model": 384, "n_layer": 6, "n_head": 6, "vocab_size": 65, "rows": 16, "pos": 256},
    "B": {"d_model": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "rows": 4, "pos": 256},
    "C": {"d_model": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "rows": 4, "pos": 64},
}
TITLES = {
    "A": "6 layers, 6 heads, d 384, T 256, B 16, V 65",
    "B": "GPT-2 124M, T 256, B 4",
    "C": "GPT-2 124M, T 64, B 4",
}
# metric -> (the contestant it divides by, at least)
GOALS: dict[str, list[tuple[str, float]]] = {
    "A": [("nanoGPT as shipped", 2.2), ("nanoGPT bf16", 1.25), ("Hugging Face bf16", 1.4), ("peak", 0.78)],
    "B": [("nanoGPT as shipped", 2.0), ("nanoGPT bf16", 1.15), ("Hugging Face bf16", 1.0), ("peak", 0.65)],
    "C": [("llm.c", 4.5)],
}
OURS = "Glasshouse"


def ours(shape: dict[str, int], ids: np.ndarray, *, compiled: bool, dtype: str = "bf16") -> peers_train.Step:
    """A step of the training loop: the same functions that `run_stages` calls."""
    model = GPT(
        GPTConfig(
            vocab_size=shape["vocab_size"],
            context=shape["pos"],
            d_model=shape["d_model"],
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            qk_norm=True,
        )
    ).init_weights(0)
    if compiled:
        compile_blocks(model)
    config = StageConfig(name="bench", steps=1000, batch_size=shape["rows"], optimizer="adamw", adam_lr=1e-3)
    optimizers = Optimizers(model, config)
    weight = np.ones((shape["rows"], shape["pos"]), dtype=np.float32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weight, ("random",), ids.size)

    def step() -> None:
        optimizers.zero_grad()
        backward(model, next_token, tensors(batch), dtype)
        optimizers.clip()
        optimizers.step(1.0)

    return step


def contestants(name: str, arguments: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every trainer that can run this shape here, by name; ours last, so that its threads are set last."""
    shape = SHAPES[name]
    ids = generator("bench", name).integers(0, shape["vocab_size"], size=(shape["rows"], shape["pos"] + 1))
    tokens = torch.from_numpy(ids)
    steps: dict[str, Any] = {}
    if arguments.nanogpt:
        with contextlib.redirect_stdout(sys.stderr):
            steps["nanoGPT as shipped"] = peers_train.nanogpt(arguments.nanogpt, shape, tokens, "fp32")
            steps["nanoGPT bf16"] = peers_train.nanogpt(arguments.nanogpt, shape, tokens, "bf16")
    if name != "C":
        steps["Hugging Face bf16"] = peers_train.huggingface(shape, tokens, "bf16")
    if name == "C" and arguments.llmc:
        steps["llm.c"] = stack.enter_context(peers_train.LlmC(arguments.llmc, torch.get_num_threads()))
    steps[f"{OURS}, plain blocks"] = ours(shape, ids, compiled=False)
    steps[OURS] = ours(shape, ids, compiled=True)
    return steps


def flops(shape: dict[str, int]) -> float:
    """Operations per token of this shape, matrices only: 6 N + 12 L d T."""
    d, layers = shape["d_model"], shape["n_layer"]
    return 6.0 * (12 * layers * d * d + shape["vocab_size"] * d) + 12.0 * layers * d * shape["pos"]


def race(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one shape. The median of rounds; in each, every contestant makes one step."""
    shape = SHAPES[name]
    took: dict[str, list[float]] = {}
    peaks = []
    with contextlib.ExitStack() as stack:
        steps = contestants(name, arguments, stack)
        first = {who: _seconds(step) for who, step in steps.items()}  # compiles and fills caches
        for step in steps.values():
            step()
        with Quiet() as quiet:
            for _ in range(arguments.rounds):
                for who, step in steps.items():
                    took.setdefault(who, []).append(_seconds(step))
                peaks.append(gemm_peak("bf16", size=1536, seconds=0.3))
    if quiet.disturbed and not arguments.keep_disturbed:
        raise SystemExit(
            f"shape {name}: other processes took {quiet.foreign:.0%} of the machine (limit {FOREIGN_LIMIT:.0%}); "
            "nothing was written. Run it again when the machine is quiet"
        )
    tokens, peak = shape["rows"] * shape["pos"], statistics.median(peaks)
    speed = {who: tokens / statistics.median(s) for who, s in took.items()}
    about = {"shape": TITLES[name], "rounds": arguments.rounds, "foreign": quiet.foreign}
    print(f"\n{TITLES[name]}: bf16 peak {peak / 1e9:.0f} GFLOP/s, others took {quiet.foreign or 0:.1%}")
    for who, rate in speed.items():
        share = rate * flops(shape) / peak
        print(f"  {who:26s} {rate:8.0f} tokens/s  {share:6.1%} of peak  first step {first[who]:.1f} s")
    rows = [
        row(
            f"{name}: tokens per second, {who}",
            round(rate, 1),
            share_of_peak=rate * flops(shape) / peak,
            **about,
        )
        for who, rate in speed.items()
    ]
    for who, goal in GOALS[name]:
        if who == "peak":
            share = speed[OURS] * flops(shape) / peak
            rows.append(
                row(f"{name}: share of bf16 peak", share, goal=f">= {goal:.0%}", met=share >= goal, **about)
            )
        elif who in speed:
            # The ratio of each round, then the median: what slowed a round slowed both.
            ratio = statistics.median(b / a for a, b in zip(took[OURS], took[who], strict=True))
            rows.append(
                row(
                    f"{name}: times as fast",
                    ratio,
                    peer=who,
                    peer_value=1.0,
                    goal=f">= {goal}",
                    met=ratio >= goal,
                    **about,
                )
            )
    return rows


def memory(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak resident memory of two steps, each contestant in a process of its own."""
    peaks = {}
    for who in ("nanoGPT as shipped", OURS, f"{OURS}, plain blocks"):
        if who.startswith("nanoGPT") and not arguments.nanogpt:
            continue
        command = [sys.executable, "-W", "ignore", __file__, "--shapes", name, "--one", who]
        command += ["--nanogpt", str(arguments.nanogpt)] if arguments.nanogpt else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = json.loads(done.stdout.splitlines()[-1])
    peer = peaks.get("nanoGPT as shipped")
    print(f"{TITLES[name]}: peak memory " + ", ".join(f"{who} {mb:.0f} MB" for who, mb in peaks.items()))
    about = {"peer": "nanoGPT as shipped", "peer_value": peer, "goal": "<= nanoGPT fp32"}
    return [
        row(f"{name}: peak memory in MB, {who}", mb, **about, met=None if peer is None else mb <= peer)
        for who, mb in peaks.items()
        if who.startswith(OURS)
    ]


def one(name: str, who: str, arguments: argparse.Namespace) -> None:
    """Make two steps of one contestant and print this process's peak memory in MB."""
    shape = SHAPES[name]
    ids = generator("bench", name).integers(0, shape["vocab_size"], size=(shape["rows"], shape["pos"] + 1))
    if who.startswith(OURS):
        step = ours(shape, ids, compiled=who == OURS)
    else:
        step = peers_train.nanogpt(arguments.nanogpt, shape, torch.from_numpy(ids), "fp32")
    step()
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _seconds(step: peers_train.Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    """Race the shapes asked for and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="A,B,C", help="of A, B, C")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's source")
    parser.add_argument("--llmc", type=Path, help="folder with llm.c's source")
    parser.add_argument(
        "--keep-disturbed", action="store_true", help="do not reject a run that others slowed"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.shapes.split(",")
    if arguments.one:
        return one(names[0], arguments.one, arguments)
    rows = [r for name in names for r in race(name, arguments)]
    rows += [r for name in names if name != "C" for r in memory(name, arguments)]
    write("train", rows)
    return None


if __name__ == "__main__":
    main()
