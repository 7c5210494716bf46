"""Training speed beside nanoGPT, Hugging Face and llm.c: whole steps, taking turns.

    make bench-train NANOGPT=/path/to/nanoGPT LLMC=/path/to/llm.c

Every contestant lives in a process of its own, as its users run it, and makes a step when it is told to: one
after the other, round by round, while the rest sleep. A step is batch -> gradient -> clipping -> AdamW on the
same random tokens and shape; ours is the code of the training loop, with the memory setting of `run_stages`.
The peak of matrix products is measured between the rounds, and a run in which other processes took more than
a tenth of the machine is thrown away. Operations per token are 6 N + 12 L d T with N the matrices of the
shape, the same for all. Prints tables and writes benchmarks/results/train.json.
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait cost several-fold as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peers_train
from common import FOREIGN_LIMIT, Quiet, row, write
from contestant import Contestant
from glasshouse.base.rng import generator
from glasshouse.model.compiled import compile_blocks
from glasshouse.train.allocator import keep_freed_memory
from glasshouse.train.throughput import gemm_peak
from our_step import flops, model_of, training_step

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


def ours(shape: dict[str, int], ids: np.ndarray, *, compiled: bool) -> peers_train.Step:
    """A step in bf16 by the functions that `run_stages` calls, on the default config."""
    keep_freed_memory()
    model = model_of(shape)
    if compiled:
        compile_blocks(model)
    return training_step(model, ids, "bf16")


def make(who: str, name: str, nanogpt: Path | None) -> peers_train.Step:
    """The step of one contestant."""
    shape = SHAPES[name]
    ids = generator("bench", name).integers(0, shape["vocab_size"], size=(shape["rows"], shape["pos"] + 1))
    tokens = torch.from_numpy(ids)
    match who:
        case "nanoGPT as shipped" | "nanoGPT bf16":
            assert nanogpt is not None
            return peers_train.nanogpt(nanogpt, shape, tokens, "bf16" if who.endswith("bf16") else "fp32")
        case "Hugging Face bf16":
            return peers_train.huggingface(shape, tokens, "bf16")
    return ours(shape, ids, compiled=who == OURS)


def work(who: str, name: str, nanogpt: Path | None) -> None:
    """Answer commands on standard input: a step's seconds, the peak of products, this process's memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print is no answer
    step = make(who, name, nanogpt)
    for command in sys.stdin:
        match command.strip():
            case "step":
                began = time.perf_counter()
                step()
                answer = time.perf_counter() - began
            case "peak":
                answer = gemm_peak("bf16", size=1536, seconds=0.3)
            case _:
                answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answers.write(f"{answer}\n")
        answers.flush()


def contestant(who: str, name: str, arguments: argparse.Namespace) -> Contestant:
    """One that answers "step" (seconds), "peak" (operations per second) and "memory" (MB at most so far)."""
    command = [sys.executable, "-W", "ignore", __file__, "--work", who, "--shapes", name]
    command += ["--threads", str(arguments.threads)]
    command += ["--nanogpt", str(arguments.nanogpt)] if arguments.nanogpt else []
    return Contestant(who, command)


def line_up(name: str, arguments: argparse.Namespace) -> list[str]:
    """Who can run this shape here."""
    peers = ["nanoGPT as shipped", "nanoGPT bf16"] if arguments.nanogpt else []
    peers += ["Hugging Face bf16"] if name != "C" else []
    return [*peers, f"{OURS}, plain blocks", OURS]


def race(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one shape. The median of rounds; in each, every contestant makes one step."""
    shape = SHAPES[name]
    took: dict[str, list[float]] = {}
    peaks = []
    with contextlib.ExitStack() as stack:
        steps: dict[str, Any] = {
            who: stack.enter_context(contestant(who, name, arguments)) for who in line_up(name, arguments)
        }
        judge = steps[OURS]
        if name == "C" and arguments.llmc:
            steps["llm.c"] = stack.enter_context(peers_train.LlmC(arguments.llmc, arguments.threads))
        first = {who: step() for who, step in steps.items()}  # compiles and fills caches
        for step in steps.values():
            step()
        with Quiet() as quiet:
            for _ in range(arguments.rounds):
                for who, step in steps.items():
                    took.setdefault(who, []).append(step())
                peaks.append(judge.ask("peak"))
        memory = {who: step.ask("memory") for who, step in steps.items() if isinstance(step, Contestant)}
    if quiet.disturbed and not arguments.keep_disturbed:
        raise SystemExit(
            f"shape {name}: others took {quiet.foreign:.0%} of the machine (limit {FOREIGN_LIMIT:.0%}); "
            "nothing was written. Run it again when the machine is quiet"
        )
    tokens, peak = shape["rows"] * shape["pos"], statistics.median(peaks)
    speed = {who: tokens / statistics.median(s) for who, s in took.items()}
    about = {"shape": TITLES[name], "rounds": arguments.rounds, "foreign": quiet.foreign}
    print(f"\n{TITLES[name]}: bf16 peak {peak / 1e9:.0f} GFLOP/s, others took {quiet.foreign or 0:.1%}")
    for who, rate in speed.items():
        share = rate * flops(shape) / peak
        used = f"{memory[who]:.0f} MB" if who in memory else ""
        print(f"  {who:26s} {rate:8.0f} tokens/s  {share:6.1%} of peak  first {first[who]:.1f} s  {used}")
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
    peer = memory.get("nanoGPT as shipped")
    for who in (OURS, f"{OURS}, plain blocks") if name != "C" else ():
        met = None if peer is None else memory[who] <= peer
        about_memory = {"peer": "nanoGPT as shipped", "peer_value": peer, "goal": "<= the peer", "met": met}
        rows.append(row(f"{name}: peak memory in MB, {who}", memory[who], **about_memory, **about))
    return rows


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
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.shapes.split(",")
    if arguments.work:
        work(arguments.work, names[0], arguments.nanogpt)
        return
    write("train", [r for name in names for r in race(name, arguments)])


if __name__ == "__main__":
    main()
