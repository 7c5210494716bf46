"""Attribution: what it costs against doing it naively, and how far the estimates are from exact patching.

Timings are ratios of medians of interleaved turns in one process. Agreement is a correlation over places with
a bootstrap interval over rows, on models trained here for the purpose; nothing was chosen by it.

    python benchmarks/bench_attribution.py              # both parts; costs want the machine to themselves
    python benchmarks/bench_attribution.py agreement
    python benchmarks/bench_attribution.py costs
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import RESULTS, Quiet, interleave, medians, row, write
from glasshouse.interp.attribution import (
    Effects,
    activation_gradients,
    attention_inputs,
    attribution_patching,
    components,
    fit_tuned_lens,
    integrated_gradients,
    logit_lens,
    patch_activations,
    path_patching,
)
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.model import GPT, GPTConfig, Taps

GPT2_SMALL: dict[str, Any] = {
    **{"vocab_size": 50257, "context": 1024, "d_model": 768, "n_layer": 12, "n_head": 12},
    **{"norm": "layer", "position": "learned", "mlp": "plain", "activation": "gelu_tanh"},
    **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
}
SITES = ("z", "mlp_out")


def build(seed: int, **shape: Any) -> GPT:
    """A random model in which every component writes something."""
    model = GPT(GPTConfig.model_validate(shape)).init_weights(seed).eval()
    drawn = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o.weight", "down.weight")):
                p.copy_(torch.randn(p.shape, generator=drawn) * 0.02)
    return model


def rows(n: int, pos: int, vocab: int, seed: int) -> Contrast:
    """Random rows differing at position 2; the metric is a logit difference at the last."""
    drawn = torch.Generator().manual_seed(seed)
    clean = torch.randint(vocab, (n, pos), generator=drawn)
    corrupt = clean.clone()
    corrupt[:, 2] = (corrupt[:, 2] + 1 + torch.randint(vocab - 1, (n,), generator=drawn)) % vocab
    right, wrong = torch.randint(vocab, (2, n), generator=drawn)
    return Contrast(clean, corrupt, LogitDifference(right, wrong, torch.full((n,), pos - 1)))


def frozen_run(model: GPT, data: Contrast) -> None:
    """Gradients on activations alone, as attribution patching takes them."""
    sites = [f"blocks.{i}.{s}" for i in range(model.config.n_layer) for s in SITES]
    activation_gradients(model, data.clean, data.metric, torch.arange(len(data)), sites)


def naive_run(model: GPT, data: Contrast) -> None:
    """The same gradients by a backward pass through everything, as a hook that retains them has it."""
    sites = [f"blocks.{i}.{s}" for i in range(model.config.n_layer) for s in SITES]
    with Taps(read=sites) as taps:
        value = data.metric(model(data.clean, taps), torch.arange(len(data))).sum()
    for site in sites:
        taps[site].retain_grad()
    value.backward()  # type: ignore[no-untyped-call]
    assert all(taps[site].grad is not None for site in sites)
    model.zero_grad(set_to_none=True)


def one_by_one(model: GPT, data: Contrast) -> Tensor:
    """Every head and MLP patched in a forward pass of its own, from the beginning: [place, n]."""
    config, rows_ = model.config, torch.arange(len(data))
    with torch.no_grad(), Taps(read=["blocks.*.z", "blocks.*.mlp_out"]) as source:
        model(data.clean, source)
    found = []
    with torch.no_grad():
        base = data.metric(model(data.corrupt), rows_)
        for place in components(model):
            with Taps(edit={place.site: exchange(source[place.site], place.head)}) as taps:
                found.append(data.metric(model(data.corrupt, taps), rows_) - base)
    assert len(found) == config.n_layer * (config.n_head + 1)
    return torch.stack(found)


def exchange(source: Tensor, head: int | None) -> Callable[[Tensor], Tensor]:
    """Put one head of ``source`` (None: all of it) in place."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        at = (slice(None),) if head is None else (slice(None), head)
        x[at] = source[at]
        return x

    return edit


def peak(which: str) -> float:
    """Peak memory, in MiB, of one run in a process of its own."""
    found = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True)
    return float(found.stdout.strip().splitlines()[-1])


def costs() -> list[dict[str, Any]]:
    """Ratios of time and memory."""
    torch.set_num_threads(2)
    large, data = build(0, **GPT2_SMALL), rows(2, 128, 50257, 0)
    with Quiet() as quiet:
        took = medians(
            interleave(
                {"frozen": lambda: frozen_run(large, data), "naive": lambda: naive_run(large, data)}, 4
            )
        )
    share = took["frozen"] / took["naive"]
    about = {"n": 4, "foreign": quiet.foreign, "seconds": took, "shape": "GPT-2 small, 2 rows of 128"}
    goal = {"goal": "<= 0.66", "met": share <= 0.66}
    out = [row("attribution with parameters frozen, time / naive forward+backward", share, **goal, **about)]
    del large
    memory = {which: peak(which) for which in ("frozen", "naive")}
    ratio = memory["frozen"] / memory["naive"]
    out.append(row("attribution with parameters frozen, peak memory / naive", ratio, mebibytes=memory))
    small = {"vocab_size": 512, "context": 64, "d_model": 128, "n_layer": 6, "n_head": 8}
    for name, n, pos in (("8 rows of 16", 8, 16), ("1 row of 32", 1, 32)):
        model, data = build(1, **small), rows(n, pos, 512, 1)
        exact = patch_activations(model, data).per_row
        assert torch.allclose(exact, one_by_one(model, data).double(), atol=1e-4)
        with Quiet() as quiet:
            took = medians(
                interleave(
                    {
                        "batched": lambda m=model, d=data: patch_activations(m, d),
                        "one by one": lambda m=model, d=data: one_by_one(m, d),
                        "estimate": lambda m=model, d=data: attribution_patching(m, d),
                        "paths": lambda m=model, d=data: path_patching(m, d, "a5.h0<q>"),
                    },
                    6,
                )
            )
        more = {"n": 6, "foreign": quiet.foreign, "seconds": took, "shape": f"6 layers, 8 heads, {name}"}
        gain = took["one by one"] / took["batched"]
        out.append(
            row(f"exact patching, one by one / batched, {name}", gain, goal="> 1", met=gain > 1, **more)
        )
        gain = took["batched"] / took["estimate"]
        out.append(row(f"exact patching / attribution patching, time, {name}", gain, **more))
    return out


def grown(seed: int) -> GPT:
    """A model trained for some seconds to continue: after "x .. x" comes what followed x before."""
    model = build(seed, vocab_size=32, context=32, d_model=64, n_layer=3, n_head=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    drawn = torch.Generator().manual_seed(seed + 1)
    for step in range(300):
        tokens = repeated(32, drawn)
        said = model(tokens[:, :-1])[:, 10:]
        loss = F.cross_entropy(said.flatten(0, 1), tokens[:, 11:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (300 - step) / 100)
        optimizer.step()
    return model.eval()


def repeated(n: int, drawn: torch.Generator) -> Tensor:
    """Rows of ten random tokens said twice."""
    half = torch.stack([torch.randperm(32, generator=drawn)[:10] for _ in range(n)])
    return torch.cat([half, half], 1)


def agreement(seeds: int = 3) -> list[dict[str, Any]]:
    """Estimates against exact patching; lenses and integrated gradients on the same trained models."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    for seed in range(seeds):
        model, drawn = grown(seed), torch.Generator().manual_seed(seed + 100)
        clean = repeated(64, drawn)
        corrupt = clean.clone()
        corrupt[:, 5] = (corrupt[:, 5] + 1 + torch.randint(31, (64,), generator=drawn)) % 32
        # Position 14 repeats position 4; what followed it, position 5, is exchanged.
        data = Contrast(clean, corrupt, LogitDifference(clean[:, 5], corrupt[:, 5], torch.full((64,), 14)))
        nodes, qk = components(model), [p for p in attention_inputs(model) if p.part in "qk"]

        def pair(places: Any, fix: bool, model: GPT = model, data: Contrast = data) -> Effects:
            return attribution_patching(model, data, places, qk_fix=fix)

        exact, exact_qk = patch_activations(model, data, nodes), patch_activations(model, data, qk)
        numbers = {
            "heads and MLPs": pair(nodes, True).correlation(exact),
            "queries and keys, plain": pair(qk, False).correlation(exact_qk),
            "queries and keys, QK fix": pair(qk, True).correlation(exact_qk),
        }
        for name, score in numbers.items():
            found.setdefault(f"attribution patching against exact, correlation: {name}", []).append(score)
        whole = integrated_gradients(model, clean, data.metric, baseline=corrupt, most_steps=256)
        found.setdefault("integrated gradients, share missing to completeness", []).append(whole.incomplete)
        found.setdefault("integrated gradients, steps to 1%", []).append(whole.convergence[-1][0])
        lens = fit_tuned_lens(model, repeated(512, drawn), steps=200, batch_size=16, lr=3e-3, seed=seed)
        held_out = repeated(64, drawn)
        gain = logit_lens(model, held_out, lens).gain_over(logit_lens(model, held_out))
        found.setdefault("tuned lens, nats of KL below logit lens, after layer 1", []).append(
            gain["blocks.1.resid_post"]
        )
    return [_over_seeds(name, values) for name, values in found.items()]


def _over_seeds(name: str, values: list[Any]) -> dict[str, Any]:
    """One row: the mean over seeds, and each seed's number with its interval."""
    if isinstance(values[0], int):
        return row(name, sum(values) / len(values), seeds=len(values), each=values)
    each = [{"value": s.value, "low": s.low, "high": s.high, "n": s.n} for s in values]
    mean = sum(s.value for s in values) / len(values)
    return row(name, mean, seeds=len(values), each=each)


def main() -> None:
    parts = {"agreement": agreement, "costs": costs}
    asked = sys.argv[1] if len(sys.argv) > 1 else "all"
    if asked in ("frozen", "naive"):  # one run in a process of its own, for its peak memory
        torch.set_num_threads(2)
        {"frozen": frozen_run, "naive": naive_run}[asked](build(0, **GPT2_SMALL), rows(2, 128, 50257, 0))
        status = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    found = {name: run() for name, run in parts.items() if asked in (name, "all")}
    file = RESULTS / "attribution.json"
    old = json.loads(file.read_text()) if file.exists() and asked != "all" else []
    kept = [r for r in old if r["part"] not in found]
    write("attribution", kept + [r | {"part": name} for name, new in found.items() for r in new])


if __name__ == "__main__":
    main()
