"""Training sparse autoencoders beside sparsify, dictionary_learning and SAELens: speed, and what is learned.

    bench_sae.py --sparsify PYTHON --saelens PYTHON --dictionary-learning PYTHON

Each PYTHON is the interpreter of an environment with that package; a peer without one is left out. Shape:
d_in 256, 4,096 features, k 32, batches of 4,096. Every contestant is a process of its own; they take turns.

Speed: the updates of the training loop (guard, clipping, dead tracking, projection and all), with the
auxiliary loss switched on everywhere, once with no feature dead and once with a tenth of them taken for dead,
so that it has work to do.

Recovery: activations are sparse sums of 4,096 known unit vectors (`toy_features`); what counts is the share
that some decoder row has at cosine above 0.9. Learning rates are swept for each contestant on a seed of its
own, and the best goes on to the seeds that are reported. A time budget is turned into steps by the measured
speed, so recovery after equal activations and after equal time does not depend on how busy the machine is.
Everybody's schedule is its package's default (ours warms up and decays, sparsify's optimiser needs none, the
others' rates are constant), except that warm-ups in steps are cut to ten; "constant rate" is ours without
its decay.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers_sae
from common import FOREIGN_LIMIT, RESULTS, Quiet, row, write
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.score import bootstrap
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.dictionaries.bank import Bank, BankTrainee, Sites, bank_loss
from glasshouse.interp.dictionaries.train import TrainingConfig
from glasshouse.train import Stage
from glasshouse.train.allocator import keep_freed_memory
from glasshouse.train.update import Updater
from peers_sae import BATCH, D_SAE, WARMUP_STEPS
from raw import Raw
from toy_features import ACTIVE, D_IN

OURS, OURS_FP32, OURS_CONSTANT = "Glasshouse", "Glasshouse, fp32", "Glasshouse, constant rate"
SHAPE = "d_in 256, d_sae 4096, k 32, batch 4096"
DEAD = {"no feature dead": 0, "a tenth dead": D_SAE // 10}
RATIOS = {"sparsify": 1.15, "dictionary_learning": 2.5, "SAELens": 3.3}
GOAL, STRETCH = 20_000, 25_000
# sparsify's own default at this width is 1e-2.
RATES = [1e-2, 2e-2, 4e-2, 8e-2]
LEARNERS = (OURS, OURS_CONSTANT, "sparsify", "sparsify, Adam", "dictionary_learning", "SAELens")
SWEEP_SEED, SEEDS = 100, (0, 1, 2)
RUN = ("who", "lr", "seed", "marks", "active")  # what tells finished runs apart
STEPS = 10**6  # of a stage that is raced: it never ends by itself


def ours(who: str, lr: float, seed: int, steps: int) -> peers_sae.Contestant:
    """The loop's own updates, on a dictionary of the default training configuration."""
    keep_freed_memory()
    config = DictionaryConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=peers_sae.K, site="toy")
    dictionary = Dictionary(config).init_weights(seed)
    dtype = "fp32" if who == OURS_FP32 else "bf16"
    how = TrainingConfig(steps=steps, batch_size=BATCH, dtype=dtype)
    if who == OURS_CONSTANT:
        how = TrainingConfig(
            steps=steps, batch_size=BATCH, warmup_share=WARMUP_STEPS / steps, decay_share=0.0, dtype=dtype
        )
    plan = DataPlan(phases=(Phase(from_step=0, weights={"toy": 1.0}),), digests={"toy": "0" * 64})
    now: dict[str, Tensor] = {}
    stage = Stage(how.stage(), lambda step, _: Sites({"toy": now["x"]}, ("toy",)), plan)
    bank = Bank({"main": dictionary})
    updates = Updater(bank, stage, bank_loss, dtype, "fp32", BankTrainee({"main": lr}))
    bank.train()

    def step(i: int, x: Tensor) -> None:
        if i == 0:
            dictionary.b_dec.data.copy_(x.mean(0))
        now["x"] = x
        updates(i, plan, None)

    def kill(n: int) -> None:
        dictionary.b_enc.data[:n], dictionary.since_fired[:n] = peers_sae.NEVER, 10**9

    return peers_sae.Contestant(step, lambda: dictionary.W_dec.detach(), kill)


class Worker:
    """A contestant in a process of its own; it ends with the ``with`` block."""

    def __init__(self, who: str, python: str, threads: int):
        here = Path(__file__).parent
        script = (
            [str(here / "bench_sae.py"), "--work"] if who.startswith(OURS) else [str(here / "peers_sae.py")]
        )
        self.who = who
        self._process = subprocess.Popen(
            [python, "-W", "ignore", *script, who, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, request: Any) -> Any:
        """The answer to a request of `peers_sae.serve`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.who} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def line_up(arguments: argparse.Namespace) -> dict[str, str]:
    """Who takes part, and the interpreter of each."""
    peers = {
        "sparsify": arguments.sparsify,
        "dictionary_learning": arguments.dictionary_learning,
        "SAELens": arguments.saelens,
        "SAELens, autocast": arguments.saelens,
    }
    return {OURS: sys.executable, OURS_FP32: sys.executable} | {w: p for w, p in peers.items() if p}


def race(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Activations per second; in each round every contestant makes one step."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(who, python, arguments.threads))
            for who, python in line_up(arguments).items()
        ]
        for about, dead in DEAD.items():
            took: dict[str, list[float]] = {worker.who: [] for worker in workers}
            for worker in workers:
                worker.ask({"lr": 1e-3, "seed": 0, "dead": dead, "steps": STEPS})
                for _ in range(3):
                    worker.ask("step")
            with Quiet() as quiet:
                for _ in range(arguments.rounds):
                    for worker in workers:
                        took[worker.who].append(worker.ask("step"))
            if quiet.disturbed and not arguments.keep_disturbed:
                raise SystemExit(
                    f"others took {quiet.foreign:.0%} of the machine (limit {FOREIGN_LIMIT:.0%}); nothing "
                    "was written. Run it again when the machine is quiet"
                )
            rows += speed_rows(took, about, quiet.foreign, arguments)
    return rows


def speed_rows(
    took: dict[str, list[float]], about: str, foreign: float | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Medians, and the median over rounds of how much longer each peer took."""
    more = {"shape": SHAPE, "rounds": arguments.rounds, "foreign": foreign, "threads": arguments.threads}
    rows = []
    for who, seconds in took.items():
        low, *_, high = sorted(BATCH / s for s in seconds)
        speed = BATCH / statistics.median(seconds)
        goal = {"goal": f">= {GOAL} (stretch {STRETCH})", "met": speed >= GOAL} if who == OURS else {}
        metric = f"activations per second, {about}: {who}"
        rows.append(row(metric, round(speed), slowest=round(low), fastest=round(high), **goal, **more))
    for peer, least in RATIOS.items():
        if peer in took:
            ratio = statistics.median(b / a for a, b in zip(took[OURS], took[peer], strict=True))
            met = {"goal": f">= {least}", "met": ratio >= least}
            rows.append(row(f"times as fast, {about}", ratio, peer=peer, peer_value=1.0, **met, **more))
    return rows


# -- what is learned ---------------------------------------------------------------------------------------


def recover(arguments: argparse.Namespace, speeds: dict[str, float]) -> list[dict[str, Any]]:
    """Shares of true features found; ``speeds`` in activations per second turn seconds into steps."""
    pythons = line_up(arguments) | {"sparsify, Adam": arguments.sparsify, OURS_CONSTANT: sys.executable}
    speeds = speeds | {"sparsify, Adam": speeds.get("sparsify", 0.0), OURS_CONSTANT: speeds[OURS]}
    names = [who for who in LEARNERS if pythons.get(who) and speeds.get(who) and who in arguments.who]
    steps = {who: max(1, round(arguments.seconds * speeds[who] / BATCH)) for who in names}
    equal = steps.get(OURS) or max(1, round(arguments.seconds * speeds[OURS] / BATCH))
    rows = []
    for who in names:
        marks = sorted({0, steps[who], equal} if who in arguments.equal_for else {0, steps[who]})
        with Worker(who, pythons[who], arguments.threads) as worker:
            rows += recovery_rows(who, worker, marks, steps[who], equal, arguments)
    ours_and_best(rows)
    return rows


def run(worker: Worker, lr: float, seed: int, marks: list[int], done: Raw) -> list[float]:
    """Shares recovered at ``marks``, of which the last ends the schedule. ``done`` keeps finished runs.

    Weights and data have seeds of their own.
    """
    key = (worker.who, lr, seed, marks, ACTIVE)
    if not done.has(*key):
        worker.ask({"lr": lr, "seed": seed, "dead": 0, "steps": max(marks)})
        shares = worker.ask({"marks": marks, "data": seed})
        done.add(dict(zip(RUN, key, strict=True)) | {"shares": shares})
        print(
            f"  {worker.who:20s} lr {lr:g} seed {seed}: {dict(zip(marks, shares, strict=True))}", flush=True
        )
    found: list[float] = next(r for r in done.runs if tuple(r[k] for k in RUN) == key)["shares"]
    return found


def recovery_rows(
    who: str, worker: Worker, marks: list[int], timed: int, equal: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Sweep on one seed, then the best rate on the others."""
    done = Raw(arguments.raw, RUN)
    sweep = {lr: run(worker, lr, SWEEP_SEED, marks, done) for lr in RATES}
    chosen = {mark: max(RATES, key=lambda lr: sweep[lr][marks.index(mark)]) for mark in marks if mark}
    finals = {lr: [run(worker, lr, seed, marks, done) for seed in SEEDS] for lr in set(chosen.values())}
    rows = []
    for mark, lr in chosen.items():
        found = [shares[marks.index(mark)] for shares in finals[lr]]
        score = bootstrap(found)
        named = [f"{arguments.seconds:g} s"] if mark == timed else []
        named += [f"{equal * BATCH} activations"] if mark == equal else []
        for name in named:
            rows.append(
                row(
                    f"true features recovered after {name}: {who}",
                    score.value,
                    low=score.low,
                    high=score.high,
                    each=found,
                    at_step_0=[shares[0] for shares in finals[lr]],
                    seeds=list(SEEDS),
                    lr=lr,
                    sweep={f"{rate:g}": shares[marks.index(mark)] for rate, shares in sweep.items()},
                    sweep_seed=SWEEP_SEED,
                    steps=mark,
                    active=ACTIVE,
                    shape=SHAPE,
                )
            )
    return rows


def ours_and_best(rows: list[dict[str, Any]]) -> None:
    """Put sparsify's better result beside ours."""
    for mine in rows:
        what, _, who = mine["metric"].rpartition(": ")
        theirs = [r for r in rows if r["metric"].startswith(f"{what}: sparsify")]
        if who in (OURS, OURS_CONSTANT) and theirs:
            best = max(theirs, key=lambda r: r["value"])
            mine["peer"], mine["peer_value"] = best["metric"].rpartition(": ")[2], best["value"]
            mine["goal"], mine["met"] = "at least sparsify's", mine["value"] >= best["value"]


def main() -> None:
    """Race, then train on the toy, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsify", help="python of an environment with eai-sparsify")
    parser.add_argument("--saelens", help="... with sae-lens")
    parser.add_argument("--dictionary-learning", help="... with dictionary-learning")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", default="speed,recovery", help="speed, recovery or both")
    parser.add_argument("--seconds", type=float, default=45.0, help="training time that recovery compares")
    parser.add_argument(
        "--equal-for",
        default=[OURS, OURS_CONSTANT, "sparsify", "sparsify, Adam"],
        nargs="*",
        help="who goes that far",
    )
    parser.add_argument("--who", default=list(LEARNERS), nargs="*", help="who learns")
    parser.add_argument("--raw", type=Path, default=Path("runs/bench/sae.jsonl"), help="finished runs")
    parser.add_argument("--keep-disturbed", action="store_true", help="do not reject a disturbed run")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.work:
        peers_sae.serve(ours, arguments.work)
        return
    path = RESULTS / "sae.json"
    before = json.loads(path.read_text()) if path.is_file() else []
    kept = {
        part: [r for r in before if (r["metric"][0:4] == "true") == (part == "recovery")] for part in PARTS
    }
    if "speed" in arguments.parts:
        kept["speed"] = race(arguments)
    if "recovery" in arguments.parts:
        start = f"activations per second, {next(iter(DEAD))}: "
        speeds = {
            r["metric"].removeprefix(start): float(r["value"]) for r in kept["speed"] if start in r["metric"]
        }
        if not speeds:
            raise SystemExit("recovery after equal time needs the speeds: run --parts speed first")
        new = recover(arguments, speeds)
        again = {r["metric"] for r in new}
        kept["recovery"] = [r for r in kept["recovery"] if r["metric"] not in again] + new
        ours_and_best(kept["recovery"])
    write("sae", [*kept["speed"], *kept["recovery"]])


PARTS = ("speed", "recovery")

if __name__ == "__main__":
    main()
