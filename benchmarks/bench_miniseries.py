"""The miniseries: what `model.depth` alone gives, from 2 to 8 layers, on the packed books.

Every model is the dial's, as a recipe says it: nothing is set here but the horizon, which is shortened for
a CPU (``--tokens-per-parameter``). Loss is on held-out books, in bits a byte. Finished runs are kept in
``--raw``. Results: benchmarks/results/miniseries.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

from common import row, write
from glasshouse.recipes.schema import read_recipe
from glasshouse.train import Stage, evaluate
from glasshouse.train.scaling import matrix_parameters
from loss_tasks import run_stage, score
from packed_books import CONTEXT, VOCABULARY, Books, books_parser
from raw import Raw

DEPTHS = (2, 3, 4, 5, 6, 7, 8)


def one(depth: int, ratio: float, seed: int, books: Books, threads: int | str) -> dict[str, Any]:
    """Train the dial's model of a depth and score it."""
    recipe = read_recipe(
        {
            "name": f"d{depth}",
            "data": {"books": True},
            "tokenizer": {"vocab_size": VOCABULARY},
            "model": {"depth": depth, "tokens_per_parameter": ratio, "context": CONTEXT},
            "stage": [{"name": "pretrain", "shards": ["books"], "decay_share": 0.5, "warmup_share": 0.05}],
        },
        "miniseries",
    )
    config, stage = recipe.model_config_for(books.tok.vocab_size), recipe.stage[0].stage()
    batches = books.batches(seed, stage.batch_size)
    found, model = run_stage(config, Stage(stage, batches, books.plan), seed, threads=threads)  # type: ignore[arg-type]
    scored = evaluate(model, books.held_out())
    return {
        "depth": depth,
        "ratio": ratio,
        "seed": seed,
        "width": config.d_model,
        "N": matrix_parameters(config),
        "tokens": stage.steps * stage.batch_size * CONTEXT,
        **{k: getattr(stage, k) for k in ("batch_size", "muon_lr", "adam_lr", "weight_decay")},
        **found,
        **score(scored["loss"], scored["n_bytes"], scored["targets"]),
    }


def rows(runs: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """One row a depth (means over seeds), and whether the loss falls at every step."""
    table, means = [], []
    for depth in sorted({run["depth"] for run in runs}):
        group = [run for run in runs if run["depth"] == depth]
        means.append(sum(run["bpb"] for run in group) / len(group))
        keys = ("width", "N", "parameters", "tokens", "steps", "batch_size", "muon_lr", "adam_lr")
        about = {k: group[0][k] for k in (*keys, "weight_decay", "ratio", "dtype", "threads")}
        seconds = sum(run["seconds"] for run in group) / len(group)
        more = {**about, "seconds": round(seconds, 1), "all": [run["bpb"] for run in group]}
        table.append(row(f"bits a byte at depth {depth}", round(means[-1], 4), seeds=len(group), **more))
    drops = [a - b for a, b in pairwise(means)]
    least = round(min(drops), 4) if drops else None
    table.append(
        row(
            "smallest fall of bits a byte from one depth to the next",
            least,
            goal="> 0: the loss falls with every layer",
            met=least is not None and least > 0,
            seeds=seeds,
        )
    )
    return table


def main() -> None:
    parser = books_parser(__doc__, "runs/bench/miniseries.jsonl")
    parser.add_argument("--tokens-per-parameter", type=float, default=0.25)
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="default: the trainer chooses")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ratio = arguments.tokens_per_parameter
    if arguments.one:
        books = Books(arguments.data, arguments.cache)
        found = one(arguments.one, ratio, arguments.seed, books, arguments.threads or "auto")
        print(json.dumps(found))
        return
    Books(arguments.data, arguments.cache)  # made once, before the first clock starts
    raw = Raw(arguments.raw, ("depth", "ratio", "seed"))
    for seed in range(arguments.seeds):
        for depth in arguments.depths:
            if raw.has(depth, ratio, seed):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(depth), "--seed", str(seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(done.stderr[-2000:])
            raw.add(json.loads(done.stdout.splitlines()[-1]))
            said = {k: raw.runs[-1][k] for k in ("depth", "seed", "N", "tokens", "bpb", "seconds")}
            print(said, flush=True)
    write("miniseries", rows([r for r in raw.runs if r["ratio"] == ratio], arguments.seeds))


if __name__ == "__main__":
    main()
