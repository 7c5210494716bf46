"""Finding circuits: every method's time and what it finds, beside exact patching and beside chance.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_circuits.py [--seeds 3] [--circuits DIR] [--cache DIR]

Three grounds. (1) Models of the demo's shape, taught to continue repeated random tokens: time, rank
correlation with exact patching, AUROC against its strongest 5% of edges, CPR and CMD beside random rankings,
for three ablations. (2) Transformers with planted circuits over seeds and shapes: AUROC of the known edges.
(3) With --circuits, a folder of compiled programs: AUROC against the list that matches the ablation. Rows of
finding and of CPR and CMD are other ones. --cache keeps the taught models, so that timing can be run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common import RESULTS, Quiet, row, write
from glasshouse.base.score import bootstrap
from glasshouse.interp.circuits import (
    METHODS,
    EdgeScores,
    Patcher,
    Shape,
    mib_curve,
    planted_transformer,
    pooled,
    score_edges,
)
from glasshouse.interp.metric import Contrast, Distance, LogitDifference
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.compiled_circuits import load_compiled
from glasshouse.train import StageConfig
from glasshouse.train.optim import Optimizers

DEMO = GPTConfig(
    **{"vocab_size": 2048, "context": 128, "d_model": 128, "n_layer": 4, "n_head": 4, "d_mlp": 352},
    **{"mlp": "gated", "activation": "silu", "qk_norm": True},
)
HALF, KNOWN, STEPS = 12, 64, 200  # repeated tokens, of how many; updates
SETTINGS: dict[str, dict[str, Any]] = {"masks": {"steps": 100, "samples": 2}}
LISTS = {"corrupt": "causal_edges", "zero": "zero_ablation_edges"}
SHAPES = {
    "sequential": Shape(),
    "parallel": Shape(parallel=True),
    "rms norm": Shape(norm="rms"),
    "4 layers of 2 heads": Shape(n_layer=4, n_head=2, symbols=5, length=7),
}


def repeated(n: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [n, 2 HALF] that say the same HALF different tokens twice."""
    once = torch.rand(n, KNOWN, generator=generator).argsort(1)[:, :HALF]
    return once.repeat(1, 2)


def taught(seed: int, cache: Path | None) -> GPT:
    """A model of the demo's shape that continues repetitions."""
    model = GPT(DEMO).init_weights(seed)
    path = cache / f"repeats-{seed}.safetensors" if cache is not None else None
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    stage = StageConfig(name="repeat", objective="next_token", steps=STEPS, batch_size=64, weight_decay=0.0)
    optimizers = Optimizers(model, stage)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(STEPS):
        rows = repeated(64, generator)
        logits = model(rows[:, :-1])[:, HALF - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, HALF:].flatten())
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(min(1.0, (STEPS - step) / (0.4 * STEPS)))
    print(f"seed {seed}: loss {loss.item():.3f} nats, chance {np.log(KNOWN):.2f}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval()


def induction(n: int, seed: int) -> Contrast:
    """Rows cut inside the repetition; in the twin the answer's first place holds another token."""
    generator = torch.Generator().manual_seed(seed)
    rows = repeated(n, generator)
    at = HALF + HALF // 2
    right = rows[:, at + 1 - HALF].clone()
    wrong = torch.stack([(torch.randperm(KNOWN, generator=generator))[0] for _ in range(n)])
    wrong = torch.where(wrong == right, (wrong + 1) % KNOWN, wrong)
    clean = rows[:, : at + 1]
    corrupt = clean.clone()
    corrupt[:, at + 1 - HALF] = wrong
    return Contrast(clean, corrupt, LogitDifference(right, wrong, torch.full((n,), at)))


def on_the_demos_shape(seeds: int, n: int, cache: Path | None) -> list[dict[str, Any]]:
    models = [taught(seed, cache) for seed in range(seeds)]
    rows = []
    for ablation in ("corrupt", "zero", "mean"):
        found: dict[str, list[EdgeScores]] = {}
        curves: dict[str, list[Any]] = {}
        for seed, model in enumerate(models):
            patcher = Patcher(model, induction(n, 2000 + seed), ablation)
            held = Patcher(model, induction(n, 3000 + seed), ablation)
            for method in METHODS:
                scores = score_edges(patcher, method, **SETTINGS.get(method, {}))
                found.setdefault(method, []).append(scores)
                curves.setdefault(method, []).append(mib_curve(held, scores, random=5))
        for method, scores in found.items():
            rows += compared(ablation, method, scores, found["exact"], curves[method], n)
    return rows


def compared(
    ablation: str, method: str, scores: list[EdgeScores], exact: list[EdgeScores], curves: list[Any], n: int
) -> list[dict[str, Any]]:
    """Rows of one method: time, agreement, and what its ranking recovers."""
    what = {"ablation": ablation, "n": n, "seeds": len(scores), "settings": SETTINGS.get(method, {})}
    base = f"{method}, {ablation}"
    seconds = statistics.median(s.about.seconds for s in scores)
    reference = statistics.median(s.about.seconds for s in exact)
    out = [row(f"seconds, {base}", seconds, peer="exact", peer_value=reference, **what)]
    if method != "exact":
        rank = bootstrap([s.agreement(e) for s, e in zip(scores, exact, strict=True)])
        top = [e.circuit(len(e.values) // 20).edges for e in exact]
        auroc = bootstrap([s.auroc(t).value for s, t in zip(scores, top, strict=True)])
        out.append(
            row(f"rank correlation with exact, {base}", rank.value, low=rank.low, high=rank.high, **what)
        )
        out.append(
            row(f"AUROC of exact's top 5%, {base}", auroc.value, low=auroc.low, high=auroc.high, **what)
        )
    for name in ("cpr", "cmd"):
        own = bootstrap([getattr(c, name).value for c in curves])
        chance = bootstrap([getattr(c, f"random_{name}").value for c in curves])
        interval = {"low": own.low, "high": own.high, "random_low": chance.low, "random_high": chance.high}
        title = f"{name.upper()}, {base}"
        out.append(row(title, own.value, peer="random ranking", peer_value=chance.value, **interval, **what))
    return out


def full_size(n: int = 32) -> list[dict[str, Any]]:
    """Exact patching of the demo's full edge set on whole contexts; time does not depend on the weights."""
    model = GPT(DEMO).init_weights(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.5 * p.shape[-1] ** -0.5)
    clean, corrupt = (torch.randint(2048, (n, 128), generator=generator) for _ in range(2))
    at = torch.full((n,), 127)
    began = time.perf_counter()
    patcher = Patcher(model, Contrast(clean, corrupt, LogitDifference(clean[:, 0], corrupt[:, 0], at)))
    scores = score_edges(patcher, "exact")
    took = time.perf_counter() - began
    name = (
        f"seconds, exact patching of all {len(scores.values)} edges, {n} rows of 128 tokens, nothing shared"
    )
    goal = {"goal": "< 120", "met": took < 120, "ablation": "corrupt", "n": n}
    return [row(name, took, **goal)]


def on_planted(seeds: int) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        found: dict[str, list[float]] = {method: [] for method in METHODS}
        for seed in range(200, 200 + seeds):
            planted = planted_transformer(seed, shape)
            patcher = Patcher(planted.model, planted.contrast(16))
            for method in METHODS:
                scores = score_edges(patcher, method, **SETTINGS.get(method, {}))
                found[method].append(scores.auroc(planted.edges).value)
        for method, values in found.items():
            score = bootstrap(values)
            interval = {"low": score.low, "high": score.high, "ablation": "corrupt", "n": 16}
            goal = {"goal": "1.0", "met": score.value == 1.0} if method == "exact" else {}
            title = f"AUROC, planted circuits ({name}), {method}"
            rows.append(
                row(title, score.value, peer="chance", peer_value=0.5, seeds=seeds, **goal, **interval)
            )
    return rows


def on_compiled(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name in ("hist", "reverse"):
        program = load_compiled(folder / f"{name}.npz")
        symbols = [example["x"] for example in json.loads((folder / f"{name}.io.json").read_text())]
        for ablation, known in LISTS.items():
            parts: dict[str, list[EdgeScores]] = {}
            for length in sorted({len(x) for x in symbols}):
                tokens = torch.cat([program.encode(x) for x in symbols if len(x) == length])
                clean, corrupt = tokens[0 : len(tokens) // 2 * 2 : 2], tokens[1::2]
                with torch.no_grad():
                    metric = Distance(program.model(clean))
                patcher = Patcher(program.model, Contrast(clean, corrupt, metric), ablation, split_input=True)
                for method in METHODS:
                    settings = SETTINGS.get(method, {})
                    parts.setdefault(method, []).append(score_edges(patcher, method, **settings))
            for method, scores in parts.items():
                whole = pooled(scores)
                score = whole.auroc(program.edges(known), program.edges("candidate_edges"))
                best = {"goal": "1.0", "met": score.value == 1.0} if method == "exact" else {}
                what = {
                    "ablation": ablation,
                    "n": whole.about.n,
                    "low": score.low,
                    "high": score.high,
                    **best,
                }
                title = f"AUROC, compiled program {name}, {ablation} ablation, {method}"
                rows.append(row(title, score.value, peer="chance", peer_value=0.5, **what))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--circuits", type=Path, help="folder of compiled programs (NAME.npz, NAME.json, NAME.io.json)"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps the taught models")
    parser.add_argument("--only", choices=["teach", "full", "demo", "planted", "compiled"])
    args = parser.parse_args()
    parts = {
        "full": full_size,
        "demo": lambda: on_the_demos_shape(args.seeds, args.rows, args.cache),
        "planted": lambda: on_planted(2 * args.seeds),
        "compiled": lambda: on_compiled(args.circuits) if args.circuits else [],
    }
    if args.only == "teach":
        for seed in range(args.seeds):
            taught(seed, args.cache)
        return
    chosen = parts if args.only is None else {args.only: parts[args.only]}
    before = RESULTS / "circuits.json"
    kept = json.loads(before.read_text()) if args.only and before.is_file() else []
    rows: list[dict[str, Any]] = [r for r in kept if r["part"] != args.only]
    for name, run in chosen.items():
        with Quiet() as quiet:
            made = run()
        rows += [r | {"part": name, "foreign": quiet.foreign} for r in made]
    write("circuits", rows)


if __name__ == "__main__":
    main()
