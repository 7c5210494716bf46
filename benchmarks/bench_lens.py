"""Reading activations beside Hugging Face, on GPT-2's 124M shape: T 128, B 4, fp32, random weights.

    make bench-lens

One process, contestants taking turns; a run in which others took more than a tenth of the machine is thrown
away. Both models have the same weights, and it is checked that they give the same logits and activations.
Peak memory is the largest sum of live tensors during a pass, as torch's own allocator reports it.
What a naive attribution does: a forward pass with parameters that ask for gradients, and `backward`.
Prints a table and writes benchmarks/results/lens.json (rows of other parts of the file are kept).
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait cost several-fold as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench_generate import SHAPE, random_model
from common import FOREIGN_LIMIT, RESULTS, Quiet, interleave, medians, row, write
from glasshouse.interp.metric import LogitDifference
from glasshouse.interp.reading import gradients
from glasshouse.model import GPT, Taps
from glasshouse.model.hf import save_hf

BATCH, LENGTH = 4, 128
EVERY, MIDDLE = "blocks.*.resid_post", "blocks.6.resid_post"
PEER = "Hugging Face"
OURS = ("bare", "capture", "early stop", "naive attribution", "frozen attribution")
THEIRS = ("bare", "capture", "early stop")


def metric() -> LogitDifference:
    """The logit difference of two tokens at the last position of each row."""
    ones = torch.ones(BATCH, dtype=torch.int64)
    return LogitDifference(3 * ones, 5 * ones, (LENGTH - 1) * ones)


def ours(model: GPT, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed on our side."""

    def bare() -> Tensor:
        with torch.no_grad():
            return model(tokens)

    def capture() -> dict[str, Tensor]:
        with torch.no_grad(), Taps(read=[EVERY]) as taps:
            model(tokens, taps)
        return taps.acts

    def early() -> Tensor:
        with torch.no_grad(), Taps(read=[MIDDLE], stop_early=True) as taps:
            model(tokens, taps)
        return taps[MIDDLE]

    def naive() -> dict[str, Tensor]:
        with Taps(read=[EVERY]) as taps:
            logits = model(tokens, taps)
        for x in taps.acts.values():
            x.retain_grad()
        metric()(logits, torch.arange(BATCH)).sum().backward()
        model.zero_grad(set_to_none=True)
        return {site: x.grad for site, x in taps.acts.items() if x.grad is not None}

    def frozen() -> dict[str, Tensor]:
        return gradients(model, tokens, metric(), [EVERY]).grads

    return dict(zip(OURS, (bare, capture, early, naive, frozen), strict=True))


class Stop(Exception):
    """Ends their forward pass."""


@contextlib.contextmanager
def hooked(blocks: list[torch.nn.Module], last: int | None = None) -> Iterator[list[Tensor]]:
    """What each block of theirs gives, by plain hooks; ``last`` ends the pass."""
    seen: list[Tensor] = []

    def hook(index: int, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if index == last:
            raise Stop

    handles = [b.register_forward_hook(lambda *a, i=i: hook(i, a[2])) for i, b in enumerate(blocks)]
    try:
        yield seen
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def theirs(peer: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """The same with plain forward hooks on a Hugging Face model."""
    blocks = list(peer.transformer.h)

    def bare() -> Tensor:
        with torch.no_grad():
            return peer(tokens, use_cache=False).logits

    def capture() -> list[Tensor]:
        with torch.no_grad(), hooked(blocks) as seen:
            peer(tokens, use_cache=False)
        return seen

    def early() -> Tensor:
        with torch.no_grad(), hooked(blocks, last=6) as seen:
            peer(tokens, use_cache=False)
        return seen[-1]

    return {f"{PEER} {name}": f for name, f in zip(THEIRS, (bare, capture, early), strict=True)}


def hugging_face(model: GPT) -> Any:
    """The same weights as `transformers` reads them. SystemExit without it."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("this compares with transformers: pip install 'glasshouse-lm[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_equal(mine: dict[str, Callable[[], Any]], peer: dict[str, Callable[[], Any]]) -> None:
    """SystemExit unless both models compute the same, and both attributions the same gradients."""
    off = float((mine["bare"]() - peer[f"{PEER} bare"]()).abs().max())
    middle = float((mine["early stop"]() - peer[f"{PEER} early stop"]()).abs().max())
    acts = zip(mine["capture"]().values(), peer[f"{PEER} capture"](), strict=True)
    stream = max(float((a - b).abs().max()) for a, b in acts)
    naive, frozen = mine["naive attribution"](), mine["frozen attribution"]()
    grads = max(float((naive[s] - frozen[s]).abs().max() / naive[s].abs().max()) for s in frozen)
    if max(off, middle, stream, grads) > 1e-3 or naive.keys() != frozen.keys():
        raise SystemExit(f"not the same: logits {off:.2g}, stream {stream:.2g}, gradients {grads:.2g}")
    print(f"largest differences: logits {off:.1e}, stream {stream:.1e}, gradients {grads:.1e}")


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors made during ``run`` took at any moment, what it returns included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def timings(contestants: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], float | None]:
    """Median seconds of each contestant, and the share of the machine that others took: the first quiet run
    of three, or else the last.
    """
    for attempt in range(3):
        with Quiet() as quiet:
            took = interleave(contestants, rounds, warm=1)
        if not quiet.disturbed or attempt == 2:
            break
        print(f"others took {quiet.foreign:.0%} of the machine (limit {FOREIGN_LIMIT:.0%}); once more")
    return medians(took), quiet.foreign


def rows(took: dict[str, float], peaks: dict[str, int], captured: int, about: dict[str, Any]) -> list[Any]:
    """The table."""
    bare, there = took["bare"], took[f"{PEER} bare"]

    def shares(metric: str, name: str, over: str, goal: float, peer: str | None = None) -> dict[str, Any]:
        value = took[name] / took[over]
        beside = took[f"{PEER} {name}"] / there if peer else None
        return row(metric, value, peer=peer, peer_value=beside, goal=f"<= {goal}", met=value <= goal, **about)

    peak, forward = peaks["capture"], peaks["bare"]
    allowed = forward + captured
    return [
        row("reading: forward, seconds", bare, peer=PEER, peer_value=there, **about),
        shares(
            "reading: capture of every resid_post / bare forward", "capture", "bare", 1.05, f"{PEER} hooks"
        ),
        shares("reading: early stop at layer 6 / bare forward", "early stop", "bare", 0.45, f"{PEER} hooks"),
        shares(
            "reading: attribution, parameters frozen / naive forward+backward",
            "frozen attribution",
            "naive attribution",
            0.66,
        ),
        row(
            "reading: peak bytes with capture / (forward + captured)",
            peak / allowed,
            goal="<= 1",
            met=peak <= allowed,
            **{**about, "peak": peak, "forward": forward, "captured": captured},
        ),
        row(
            "reading: peak bytes, frozen / naive attribution",
            peaks["frozen attribution"] / peaks["naive attribution"],
            **about,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = random_model(SHAPE)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    mine, peer = ours(model, tokens), theirs(hugging_face(model), tokens)
    check_equal(mine, peer)
    peaks = {name: peak_bytes(mine[name]) for name in OURS if name != "early stop"}
    captured = sum(x.numel() * x.element_size() for x in mine["capture"]().values())
    took, foreign = timings(mine | peer, options.rounds)
    shape = f"B {BATCH}, T {LENGTH}, fp32, 124M parameters"
    about = {"shape": shape, "rounds": options.rounds, "foreign": foreign, "seconds": took}
    kept = RESULTS / "lens.json"
    others = json.loads(kept.read_text()) if kept.is_file() else []
    others = [r for r in others if not r["metric"].startswith("reading: ")]
    write("lens", rows(took, peaks, captured, about) + others)


if __name__ == "__main__":
    main()
