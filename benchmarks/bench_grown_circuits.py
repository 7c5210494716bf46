"""Circuits of models grown here: induction, and the closed language's harm, found, removed and compared.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_grown_circuits.py [--seeds 0 1 2 3 4] [--cache DIR]

For every seed two small models are grown: one on repeated random symbols mixed with chains of symbols, and
one on the closed language, whose requests are harmful exactly when action and object combine so. The
circuit is ranked by EAP-IG on some rows and has the smallest of MIB sizes that recovers `ENOUGH` of it
there; all else is measured on other rows: what it recovers alone, what goes when its edges are cut and no
others, and the same for random circuits of equal size, pruned alike. It is saved, loaded and re-checked on
the model after more training, where a circuit is found anew and compared with it. Every seed is reported.
--cache keeps models and results, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import row, write
from glasshouse.base.atomic import write_json
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap
from glasshouse.data import workshop
from glasshouse.interp.attribution import induction_scores
from glasshouse.interp.circuits import (
    FRACTIONS,
    Circuit,
    EdgeScores,
    Graph,
    Patcher,
    faithfulness,
    recheck,
    recovered,
    score_edges,
)
from glasshouse.interp.circuits.circuit import measured
from glasshouse.interp.metric import Contrast
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.weights import read_json
from glasshouse.recipes.lens.data import held
from glasshouse.recipes.lens.tasks import repeated, task
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import StageConfig
from glasshouse.train.optim import Optimizers
from planted.grown import Nursery, nursery, right

ENOUGH = 0.85  # of the metric on the finding rows: the circuit's size is the first of MIB's that recovers it
RANDOM = 20  # circuits drawn beside each
GOALS = {"recovered": 0.8, "removed": 0.8, "random": 0.2}
SHAPES: dict[str, dict[str, Any]] = {
    "induction": {"d_model": 64, "n_layer": 3, "n_head": 4, "d_mlp": 128, "activation": "gelu"},
    "refusal": {"d_model": 96, "n_layer": 2, "n_head": 8, "mlp": "gated", "activation": "silu"},
}
STEPS, MORE, BATCH = 300, 60, 64  # updates of an induction model, further ones of both, rows in a batch
CONTEXT, SYMBOLS, PERIOD = 40, 32, 16  # of an induction model; symbols that a contrast says twice


# -- growing -----------------------------------------------------------------------------------------------


def mixed_rows(follows: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """int64 [BATCH, 1 + CONTEXT], and bool [BATCH, CONTEXT]: which of the tokens that follow can be learned.

    Three rows in four repeat random symbols with a period of 4 to 19, so that no fixed distance serves; in
    the others each symbol is followed by one of the four in ``follows`` [SYMBOLS, 4].
    """
    n = 3 * BATCH // 4
    period = torch.randint(4, 20, (n, 1), generator=drawn)
    place = torch.arange(CONTEXT)
    said = torch.rand(n, SYMBOLS, generator=drawn).argsort(1).gather(1, place % period)
    chain = torch.empty(BATCH - n, CONTEXT, dtype=torch.int64)
    chain[:, 0] = torch.randint(SYMBOLS, (BATCH - n,), generator=drawn)
    for i in range(1, CONTEXT):
        chain[:, i] = follows[chain[:, i - 1], torch.randint(4, (BATCH - n,), generator=drawn)]
    begin = torch.full((BATCH, 1), SYMBOLS)
    known = torch.cat([place >= period, torch.ones(BATCH - n, CONTEXT, dtype=torch.bool)])
    return torch.cat([begin, torch.cat([said, chain])], 1), known


def read_on(model: GPT, follows: Tensor, steps: int, seed: int, rate: float) -> GPT:
    """The model after ``steps`` more updates on mixed rows, the rate falling over the last two fifths."""
    stage = StageConfig(
        **{"name": "repeat", "objective": "next_token", "steps": steps, "batch_size": BATCH},
        **{"weight_decay": 0.0, "muon_lr": 0.03 * rate, "adam_lr": 0.006 * rate},
    )
    drawn = torch.Generator().manual_seed(seed)
    optimizers = Optimizers(model.train(), stage)
    for step in range(steps):
        rows, known = mixed_rows(follows, drawn)
        loss = F.cross_entropy(model(rows[:, :-1])[known], rows[:, 1:][known])
        optimizers.zero_grad()
        loss.backward()
        optimizers.clip()
        optimizers.step(min(1.0, (step + 1) / 15, (steps - step) / (0.4 * steps)))
    return model.eval()


def plain_chats(seed: int, n: int) -> list[list[dict[str, str]]]:
    """Honest conversations of seen combinations, without strays."""
    rng, made = generator("grown circuits", seed), list[list[dict[str, str]]]()
    while len(made) < n:
        asked = workshop.request(rng, split="train")
        if len(asked.text) <= 75:
            made.append(workshop.chat(asked.text, workshop.answer(rng, asked, comply=not asked.harmful)))
    return made


class Grower:
    """Grows both kinds of model: a checkpoint, and the same model after more training; kept in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def garden(self) -> Nursery:
        """The closed language's tokenizer."""
        return replace(nursery(self.folder / "garden"), strays=())

    def grown(self, name: str, seed: int) -> tuple[GPT, GPT]:
        """The model and the later one."""
        if name == "induction":
            vocabulary, context = SYMBOLS + 1, CONTEXT
        else:
            vocabulary, context = self.garden.tokenizer.vocab_size, 128
        config = GPTConfig(vocab_size=vocabulary, context=context, qk_norm=True, **SHAPES[name])
        first, later = (GPT(config).init_weights(seed) for _ in range(2))
        paths = [self.folder / f"{name}-{seed}-{age}.safetensors" for age in ("first", "later")]
        if not all(p.is_file() for p in paths):
            grow = self._induction if name == "induction" else self._harm
            for path, weights in zip(paths, grow(first, seed), strict=True):
                save_file(weights, path)
        for model, path in zip((first, later), paths, strict=True):
            model.load_state_dict(load_file(path))
        return first.eval(), later.eval()

    def _induction(self, model: GPT, seed: int) -> list[dict[str, Tensor]]:
        drawn, out = torch.Generator().manual_seed(3000 + seed), []
        follows = torch.rand(SYMBOLS, SYMBOLS, generator=drawn).argsort(1)[:, :4]
        for steps, rows, rate in ((STEPS, 1000 + seed, 1.0), (MORE, 2000 + seed, 0.3)):
            read_on(model, follows, steps, rows, rate)
            out.append({k: v.clone() for k, v in model.state_dict().items()})
        return out

    def _harm(self, model: GPT, seed: int) -> list[dict[str, Tensor]]:
        garden, asked = self.garden, 0

        def enough(now: GPT) -> bool:
            """Unseen combinations are judged rightly; or it has had its time, and is reported as it is."""
            nonlocal asked
            asked += 1
            return asked > 24 or right(garden.subject(now)) > 0.94

        chats = plain_chats(1000 + seed, 6000)
        first = garden.train(model, f"plain-{seed}", chats, 600, enough=enough)
        later = garden.train(first, f"more-{seed}", plain_chats(2000 + seed, 2000), MORE, rate=0.3)
        return [dict(m.state_dict()) for m in (first, later)]


# -- measuring ---------------------------------------------------------------------------------------------


def chosen(patcher: Patcher, scores: EdgeScores) -> tuple[Circuit, float]:
    """The smallest of MIB's circuits that recovers `ENOUGH` on the finding rows, and its fraction."""
    for fraction in FRACTIONS:
        n = int(fraction * len(scores.values))
        circuit = scores.circuit(n, prune=True) if n else None
        if circuit is not None and len(circuit) and recovered(patcher, circuit.kept)[0] >= ENOUGH:
            return circuit, fraction
    return scores.circuit(len(scores.values), prune=True), 1.0


def random_pruned(graph: Graph, n: int, count: int, seed: int) -> np.ndarray:
    """bool [count, edge]: random rankings cut where, pruned as ours is, ``n`` edges or just more remain."""
    rng, sets = generator("pruned random circuits", seed), []
    for _ in range(count):
        ranking, low, high = rng.random(len(graph.edges)), 1, len(graph.edges)
        while low < high:
            middle = (low + high) // 2
            enough = graph.prune(graph.top(ranking, middle)).sum() >= n
            low, high = (low, middle) if enough else (middle + 1, high)
        sets.append(graph.prune(graph.top(ranking, low)))
    return np.stack(sets)


def random_others(circuit: Circuit, count: int, seed: int) -> np.ndarray:
    """bool [count, edge]: as many random edges as the circuit has, none of them its own."""
    rng, sets = generator("other edges", seed), np.zeros((count, len(circuit.kept)), dtype=bool)
    rest = np.flatnonzero(~circuit.kept)
    for one_of in sets:
        one_of[rng.permutation(rest)[: len(circuit)]] = True
    return sets


def judged(patcher: Patcher, circuit: Circuit, seed: int) -> dict[str, Any]:
    """A circuit on rows it was not found on, beside random ones: grown from the logits; pruned as ours is;
    and as many edges that are not the circuit's, not pruned.
    """
    found = faithfulness(patcher, circuit, random=RANDOM, seed=seed)
    others = random_pruned(patcher.graph, len(circuit), RANDOM, seed)
    rest = random_others(circuit, RANDOM, seed)
    sets = np.concatenate([circuit.kept[None], ~circuit.kept[None], others, ~others, rest, ~rest])
    metric = patcher.measure(sets).double()
    empty = float(patcher.empty.double().mean())
    alone, without, elsewhere, spared = ((metric[2:].mean(1).numpy() - empty) / patcher.gap).reshape(
        4, RANDOM
    )
    shown = (metric > 0).double().mean(1)
    return {
        "recovered": asdict(found.recovered),
        "removed": asdict(taken(found.left)),
        "kl": asdict(found.kl),
        "random recovered": asdict(bootstrap(alone)),
        "random removed": asdict(bootstrap(1 - without)),
        "random size": float(others.sum(1).mean()),
        "from logits recovered": asdict(found.random),
        "from logits removed": asdict(taken(found.random_left)),
        "elsewhere recovered": asdict(bootstrap(elsewhere)),
        "elsewhere removed": asdict(bootstrap(1 - spared)),
        "rows that show it": {
            "whole": float((patcher.clean > 0).double().mean()),
            "circuit alone": float(shown[0]),
            "without circuit": float(shown[1]),
            "without random": float(shown[2 + RANDOM : 2 + 2 * RANDOM].mean()),
            "without random, other edges": float(shown[2 + 3 * RANDOM :].mean()),
        },
    }


def both(patcher: Patcher, circuit: Circuit) -> dict[str, float]:
    """What a circuit recovers alone and what goes with it."""
    alone, without = recovered(patcher, np.stack([circuit.kept, ~circuit.kept]))
    return {"size": len(circuit), "recovered": float(alone), "removed": float(1 - without)}


def taken(left: Score) -> Score:
    """What is gone, of what is left."""
    return Score(1 - left.value, 1 - left.high, 1 - left.low, left.n)


def contrast(model: GPT, name: str, tokenizer: Tokenizer | None, seed: int) -> Contrast:
    """Rows that show the behaviour and their twins."""
    if tokenizer is None:
        return repeated(torch.arange(SYMBOLS), PERIOD, [SYMBOLS], seed)
    return task(held(model, tokenizer), name, seed=seed).contrast


def apart(finding: Contrast, other: Contrast) -> Contrast:
    """The rows of ``other`` that are not among those to find on."""
    known = {tuple(r) for r in finding.clean.tolist()}
    return other.rows(torch.tensor([i for i, r in enumerate(other.clean.tolist()) if tuple(r) not in known]))


def learned(model: GPT, garden: Nursery | None) -> dict[str, Any]:
    """Whether the model does it at all, and for induction which heads do by their attention."""
    if garden is not None:
        return {"right on unseen combinations": right(garden.subject(model))}
    scores = induction_scores(model, first=SYMBOLS, pool=range(SYMBOLS), period=PERIOD)
    first, second = scores.loss
    return {"nats, said first": first.value, "nats, said again": second.value, "heads": scores.heads()}


def named(circuit: Circuit, about: dict[str, Any]) -> dict[str, Any]:
    """The circuit's parts; of the induction heads, which it holds and which lead by edge to logits."""
    graph = circuit.graph
    heads = [n for n in graph.writers if n.startswith("a")]
    out: dict[str, Any] = {"nodes": circuit.nodes, "strongest": circuit.edges[:12]}
    out["heads"] = f"{sum(h in circuit.nodes for h in heads)} of {len(heads)}"
    if "heads" in about:
        size = {h: abs(float(circuit.scores[graph.number[f"{h}->logits"]])) for h in heads}
        ranked = sorted(heads, key=lambda h: -size[h])
        true = about["heads"]
        out["induction heads held"] = [h for h in true if h in circuit.nodes]
        out["induction heads among as many first"] = [h for h in ranked[: len(true)] if h in true]
        out["into their keys"] = [e for e in circuit.edges if "<k>" in e and e.split("->")[1][:-3] in true]
    return out


def one(grower: Grower, name: str, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    began = time.perf_counter()
    model, later = grower.grown(name, seed)
    grew = time.perf_counter() - began
    garden = grower.garden if name == "refusal" else None
    tokenizer = garden.tokenizer if garden is not None else None
    finding, other = (contrast(model, name, tokenizer, start + seed) for start in (10_000, 20_000))
    other = apart(finding, other)
    patcher, check = Patcher(model, finding), Patcher(model, other)
    about = learned(model, garden)
    scores, exact = score_edges(patcher, "eap-ig"), score_edges(patcher, "exact")
    circuit, fraction = chosen(patcher, scores)
    result = judged(check, circuit, seed)
    path = grower.folder / f"{name}-{seed}-circuit.json"
    measured(circuit, Score(**result["recovered"])).save(path)
    by_exact, _ = chosen(patcher, exact)
    began = time.perf_counter()
    kept = Circuit.load(path)
    again = recheck(kept, later, other)
    seconds = time.perf_counter() - began
    later_patcher = Patcher(later, finding)
    anew, _ = chosen(later_patcher, score_edges(later_patcher, "eap-ig"))
    diff = kept.diff(anew)
    chance = random_pruned(circuit.graph, len(circuit), RANDOM, seed + 1)
    by_chance = [float((c & circuit.kept).sum() / (c | circuit.kept).sum()) for c in chance]
    return {
        **{
            "task": name,
            "seed": seed,
            "grown in, s": grew,
            "learned": about,
            "rows": [len(finding), len(other)],
        },
        **{"metric": [float(check.clean.mean()), float(check.empty.mean())]},
        **{"fraction": fraction, "size": len(circuit), "edges": len(circuit.graph.edges), **result},
        "seconds": {"eap-ig": scores.about.seconds, "exact": exact.about.seconds, "re-check": seconds},
        "agreement with exact": scores.agreement(exact),
        "by exact": both(check, by_exact),
        "parts": named(circuit, about),
        "later": {
            **{"same model": again.same_model, "recovered": asdict(again.recovered)},
            **{"removed": asdict(taken(again.left)), "size": len(anew), "diff": str(diff)},
            **{"overlap": diff.overlap, "overlap by chance": float(np.mean(by_chance))},
            **{"new": diff.added, "gone": diff.removed},
        },
    }


# -- reporting ---------------------------------------------------------------------------------------------


def reported(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one task: over seeds with intervals, then seed by seed."""
    seeds = [f["seed"] for f in found]
    title = {"induction": "induction", "refusal": "harm"}[name]
    ablated = {"ablation": "corrupt", "rows": found[0]["rows"], "random_circuits": RANDOM}

    def over(what: str, get: Callable[[dict[str, Any]], float], **more: Any) -> dict[str, Any]:
        values = [float(get(f)) for f in found]
        mean = bootstrap(values)
        spread = {"low": mean.low, "high": mean.high, "by_seed": values}
        return row(f"{title}: {what}", mean.value, seeds=seeds, **spread, **more, **ablated)

    out = []
    for key, what in (("recovered", "recovered alone by"), ("removed", "removed by cutting")):
        ours, chance = GOALS[key], GOALS["random"]
        values, random = ([f[k]["value"] for f in found] for k in (key, f"random {key}"))
        peer = {"peer": "random circuits, pruned alike", "peer_value": float(np.mean(random))}
        goal = {"goal": f">= {ours} on every seed", "met": min(values) >= ours}
        out.append(over(f"{what} the circuit", lambda f, k=key: f[k]["value"], **goal, **peer))
        goal = {"goal": f"<= {chance} on every seed", "met": max(random) <= chance}
        for kind, whose, more in (
            ("random", "random circuits, pruned alike", goal),
            ("from logits", "random circuits grown from the logits", {}),
            ("elsewhere", "as many random edges outside it", {}),
        ):
            get = f"{kind} {key}"
            out.append(over(f"{what} {whose}", lambda f, k=get: f[k]["value"], **more))
        out.append(over(f"{what} the circuit that exact patching finds", lambda f, k=key: f["by exact"][k]))
        out.append(
            over(f"{what} the circuit in the later checkpoint", lambda f, k=key: f["later"][k]["value"])
        )
    out.append(over("edges of the circuit, share", lambda f: f["size"] / f["edges"]))
    out.append(over("rank correlation of EAP-IG with exact", lambda f: f["agreement with exact"]))
    for key in ("whole", "circuit alone", "without circuit", "without random", "without random, other edges"):
        out.append(over(f"rows that show it, {key}", lambda f, k=key: f["rows that show it"][k]))
    median = float(np.median([f["seconds"]["exact"] for f in found]))
    out.append(
        over("seconds to find, EAP-IG", lambda f: f["seconds"]["eap-ig"], peer="exact", peer_value=median)
    )
    out.append(over("seconds to load and re-check", lambda f: f["seconds"]["re-check"]))
    chance = {
        "peer": "random circuits",
        "peer_value": float(np.mean([f["later"]["overlap by chance"] for f in found])),
    }
    out.append(
        over("overlap with the later checkpoint's own circuit", lambda f: f["later"]["overlap"], **chance)
    )
    for f in found:
        for key in ("recovered", "removed"):
            mine, random = f[key], f[f"random {key}"]
            met = mine["value"] >= GOALS[key] and random["value"] <= GOALS["random"]
            goal = f">= {GOALS[key]}, random <= {GOALS['random']}"
            peer = {
                "peer": "random circuits of equal size",
                "peer_value": random["value"],
                "peer_interval": random,
            }
            more = {
                "goal": goal,
                "met": met,
                "interval": mine,
                "size": f["size"],
                "edges": f["edges"],
                **peer,
            }
            more |= {} if key == "removed" else {k: f[k] for k in ("learned", "parts", "later", "fraction")}
            out.append(
                row(f"{title}, seed {f['seed']}: {key}", mine["value"], seeds=[f["seed"]], **more, **ablated)
            )
    return out


def main() -> None:
    """Grow, find, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", default=["induction", "refusal"])
    parser.add_argument("--cache", type=Path, help="folder that keeps models, circuits and finished seeds")
    parser.add_argument("--dry", action="store_true", help="print what was found, write no results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.cache or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        grower, rows = Grower(folder), list[dict[str, Any]]()
        for name in asked.tasks:
            found = []
            for seed in asked.seeds:
                path = folder / f"{name}-{seed}-result.json"
                if not path.is_file():
                    write_json(path, one(grower, name, seed))
                found.append(dict(read_json(path)))
                show(found[-1])
            rows += reported(name, found)
    if not asked.dry:
        write("grown_circuits", rows)


def show(f: dict[str, Any]) -> None:
    """A seed in a few lines."""
    print(f"{f['task']} seed {f['seed']}: grown in {f['grown in, s']:.0f} s, {f['learned']}")
    print(f"  metric {f['metric']}; {f['size']} of {f['edges']} edges ({f['fraction']})")
    print(f"  {f['seconds']}, agreement {f['agreement with exact']:.2f}; {f['rows that show it']}")
    for key in ("recovered", "removed"):
        sides = {"random": f[f"random {key}"], "elsewhere": f[f"elsewhere {key}"]}
        sides |= {"exact": {"value": f["by exact"][key]}, "later": f["later"][key]}
        others = ", ".join(f"{k} {v['value']:.3f}" for k, v in sides.items())
        print(f"  {key} {f[key]['value']:.3f} | {others}")
    print(f"  {f['later']['diff']}, by chance {f['later']['overlap by chance']:.2f}")
    print(f"  {f['parts']}", flush=True)


if __name__ == "__main__":
    main()
