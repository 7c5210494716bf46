"""One GPU: check that every fast path computes the plain one, then time the 124M shape and a d12 run.

    .venv/bin/python benchmarks/bench_gpu.py --nanogpt /path/to/nanoGPT

Checks come first, and a failed one ends the script: a fast wrong number is worth nothing. Times are medians
over steps, with a synchronise at both ends of each; MFU is against the rate of large matrix products measured
in the same process, and against the card's data sheet where it is known. Writes benchmarks/results/gpu.json.
``--device cpu --small`` runs the same code on a toy shape without a GPU: a smoke test, whose numbers mean
nothing and are not written.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peers_train
from common import row, write
from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.attend import Rule, fused_attention, pattern_attention
from glasshouse.model.compiled import compile_blocks
from glasshouse.model.float8 import has_float8, use_float8
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import autocast, next_token, tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.scaling import horizon
from glasshouse.train.scaling import shape as shape_of
from glasshouse.train.step import backward
from our_step import batch_of, flops, model_of, training_step

# Dense bf16 operations per second from data sheets.
SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def shape(small: bool) -> dict[str, int]:
    """The 124M shape of GPT-2, or a toy of the same kind."""
    if small:
        return {"d_model": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512, "rows": 2, "pos": 64}
    return {"d_model": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50304, "rows": 32, "pos": 1024}


def build(s: dict[str, int], device: torch.device) -> GPT:
    """Our model in this shape."""
    return model_of(s, qk_norm=True).to(device)


def check(s: dict[str, int], device: torch.device) -> None:
    """Raise SystemExit if a fast path differs from the plain one on this device."""

    def same(what: str, a: torch.Tensor, b: torch.Tensor, share: float) -> None:
        off = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12))
        print(f"  {what:52s} {off:.1e} {'ok' if off <= share else 'WRONG'}")
        if not off <= share:
            raise SystemExit(f"{what}: differs by {off:.1e}, more than {share:.0e}; nothing was timed")

    q, k, v = (torch.randn(2, 4, 128, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    rule = Rule(0.125)
    exact = pattern_attention(q.float(), k.float(), v.float(), None, rule)
    same("fused attention against the plain one, bf16", fused_attention(q, k, v, None, rule), exact, 2e-2)
    tokens = torch.randint(0, s["vocab_size"], (2, min(128, s["pos"])))
    model = build(s, torch.device("cpu"))
    expected = model(tokens).detach()
    model.to(device)
    tokens = tokens.to(device)
    same("logits on the device against the CPU's, fp32", model(tokens).detach().cpu(), expected, 1e-3)
    with Taps(read=["blocks.*.resid_post"]) as taps:
        model(tokens, taps)
    with autocast("bf16", device):
        plain = model(tokens).detach()
        same("logits in bf16", plain.cpu(), expected, 5e-2)
        if device.type == "cuda":
            compile_blocks(model)
            same("compiled blocks against plain ones, bf16", model(tokens).detach(), plain, 2e-2)
    print(f"  taps read {len(taps.acts)} layers on the device")


def random_ids(s: dict[str, int]) -> np.ndarray:
    """What every contestant trains on: int64 [rows, pos + 1]."""
    return generator("gpu").integers(0, s["vocab_size"], size=(s["rows"], s["pos"] + 1))


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and the peak memory in GB (0 on a CPU)."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        step()
        wait()
        took.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return statistics.median(took), memory


def peak(device: torch.device) -> float:
    """Operations per second of large bf16 products on this device, the best of 20."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = timed(lambda: a @ b, device, 20)
    return 2.0 * n**3 / seconds


def race(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the 124M shape: ours in bf16 and FP8, nanoGPT as it ships for a GPU."""
    s = shape(arguments.small)
    contestants: dict[str, Callable[[], Callable[[], Any]]] = {}

    def ours(dtype: str) -> Callable[[], Any]:
        model = build(s, device)
        if dtype == "fp8":
            use_float8(model)
        if device.type == "cuda":
            compile_blocks(model)
        return training_step(model, random_ids(s), dtype)

    contestants["Glasshouse bf16"] = lambda: ours("bf16")
    if has_float8(device):
        contestants["Glasshouse FP8"] = lambda: ours("fp8")
    if arguments.nanogpt:
        tokens = torch.from_numpy(random_ids(s)).to(device)
        contestants["nanoGPT bf16"] = lambda: peers_train.nanogpt(
            arguments.nanogpt, s, tokens, "bf16", compiled=device.type == "cuda"
        )
    top = peak(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = next((rate for card, rate in SHEET.items() if card in name), None)
    rows = []
    for who, make in contestants.items():
        with contextlib.redirect_stdout(sys.stderr):
            step = make()
        seconds, memory = timed(step, device, arguments.steps)
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()
        speed = s["rows"] * s["pos"] / seconds
        rate = speed * flops(s)
        mfu = rate / sheet if sheet else None
        print(f"  {who:18s} {speed:12.0f} tokens/s  {rate / top:6.1%} of peak  {memory:.1f} GB")
        rows.append(
            row(
                f"124M: tokens per second, {who}",
                speed,
                share_of_peak=rate / top,
                mfu=mfu,
                memory_gb=memory,
                card=name,
            )
        )
    return rows


def d12(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A short run at depth 12 by the dial, with Muon: does the loss fall, and how fast is a step?"""
    depth = 2 if arguments.small else 12
    config = GPTConfig(
        vocab_size=512, context=64 if arguments.small else 1024, qk_norm=True, **shape_of(depth)
    )
    model = GPT(config).init_weights(0).to(device)
    if device.type == "cuda":
        compile_blocks(model)
    rows, pos, steps = (4, 64, 12) if arguments.small else (32, 1024, 200)
    by_rule = horizon(config, {"steps": steps, "batch_size": rows})
    rates = {"muon_lr": by_rule.muon_lr, "adam_lr": by_rule.adam_lr, "weight_decay": by_rule.weight_decay}
    optimizers = Optimizers(
        model, StageConfig(name="d12", steps=steps, batch_size=rows, clip_norm=1.0, **rates), "bf16"
    )
    text = (Path(__file__).parent.parent / "README.md").read_bytes()
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    draw = generator("gpu", "d12")
    losses, took = [], []
    for _ in range(steps):
        at = draw.integers(0, len(ids) - pos - 1, size=rows)
        window = np.stack([ids[a : a + pos + 1] for a in at])
        batch = batch_of(window, "README")
        began = time.perf_counter()
        optimizers.zero_grad()
        loss = backward(model, next_token, tensors(batch, device), "bf16")
        optimizers.clip()
        optimizers.step(1.0)
        losses.append(float(loss.total.detach()))
        took.append(time.perf_counter() - began)
    speed = rows * pos / statistics.median(took[3:])
    print(f"  d{depth} with Muon: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {speed:.0f} tokens/s")
    if not losses[-1] < losses[0]:
        raise SystemExit("the loss of the d12 run did not fall")
    return [row("d12: tokens per second with Muon", speed, loss_first=losses[0], loss_last=losses[-1])]


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's source")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a toy shape; nothing is written")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that this torch can use; --device cpu --small tries the script without one")
    device = torch.device(arguments.device)
    print("checks:")
    check(shape(arguments.small), device)
    print("the 124M shape:")
    rows = race(arguments, device)
    print("a run by the dial:")
    rows += d12(arguments, device)
    if not arguments.small:
        write("gpu", rows)


if __name__ == "__main__":
    main()
