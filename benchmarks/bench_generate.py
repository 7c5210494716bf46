"""Generation speed beside Hugging Face on GPT-2's 124M shape: greedy, one process, taking turns.

    make bench-generate TEXT=/path/to/some.txt

Weights are random and the same for all: ours are exported with `save_hf` and read by `transformers`. First it
is checked that both give the same logits, and in fp32 the same tokens. Then every contestant continues the
same prompts, turn by turn; a run in which other processes took more than a tenth of the machine is thrown
away. Ours is `generate` with a `Decoder` made once; what making it costs is a row of its own. The share of
memory bandwidth counts each weight once a token, against what a sum over a large array reads.
With TEXT a small model is trained on nine tenths of its bytes, and what 8-bit weights cost is measured on the
rest.
Prints a table and writes benchmarks/results/generate.json.
"""

from __future__ import annotations

import os

# Before torch is loaded: threads that spin while they wait cost several-fold as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import FOREIGN_LIMIT, Quiet, interleave, medians, row, write
from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.generate import Decoder, generate, score
from glasshouse.model.hf import save_hf
from glasshouse.model.int8 import int8_twin

SHAPE = GPTConfig(
    vocab_size=50257,
    context=1024,
    d_model=768,
    n_layer=12,
    n_head=12,
    norm="layer",
    position="learned",
    activation="gelu_tanh",
    attn_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
)
NEW = 128
RAGGED = (64, 57, 41, 33, 24, 16, 9, 5)  # prompt lengths of the batch
OURS, OURS32, INT8 = "Glasshouse bf16", "Glasshouse fp32", "Glasshouse int8"
PEER, PEER32 = "Hugging Face bf16", "Hugging Face fp32"
GOALS = {PEER: 1.4, PEER32: 2.0}


def random_model(config: GPTConfig) -> GPT:
    """Every matrix random, also those that initialisation leaves at zero."""
    model = GPT(config).init_weights(0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model.eval()


def hugging_face(folder: str, dtype: torch.dtype) -> Any:
    """The exported folder as `transformers` reads it. SystemExit without it."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit(
            "this benchmark compares with transformers: pip install 'glasshouse-lm[hf]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # nobody may stop early
    model.generation_config.pad_token_id = 0
    return model


def theirs(model: Any, prompts: list[list[int]], new: int, **options: Any) -> Callable[[], Any]:
    """A call of their ``generate`` with its default cache, on prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def run() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
            )
        return out[:, width:].tolist()

    return run


def ours(model: GPT | Decoder, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    return lambda: [g.ids for g in generate(model, prompts, new)]


def check_equal(model: GPT, peer: Any, prompt: list[int], new: int) -> float:
    """Largest difference of fp32 logits. SystemExit when the models are not the same."""
    decoder = Decoder(model)
    got = decoder.logits(decoder.prefill([prompt], decoder.cache(1, len(prompt))))
    with torch.inference_mode():
        difference = float((got - peer(torch.tensor([prompt])).logits[:, -1]).abs().max())
    same = ours(decoder, [prompt], new)() == theirs(peer, [prompt], new)()
    if difference > 1e-3 or not same:
        raise SystemExit(f"the models differ: logits by {difference:.2g}, equal tokens: {same}")
    return difference


def bandwidth() -> float:
    """Bytes per second that a sum over 512 MB reads, the best of several."""
    x = torch.ones(2**27)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - began)
    return 4 * x.numel() / min(times)


def race(
    title: str, contestants: Mapping[str, Callable[[], Any]], tokens: int, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, Any]]:
    """Tokens per second and seconds a round of each contestant, and what to note beside them."""
    with Quiet() as quiet:
        took = interleave(contestants, arguments.rounds)
    if quiet.disturbed and not arguments.keep_disturbed:
        raise SystemExit(
            f"{title}: other processes took {quiet.foreign:.0%} of the machine (limit {FOREIGN_LIMIT:.0%}); "
            "nothing was written. Run it again when the machine is quiet"
        )
    speed = {who: tokens / seconds for who, seconds in medians(took).items()}
    return speed, took, {"rounds": arguments.rounds, "foreign": quiet.foreign}


def ratios(
    title: str, took: dict[str, list[float]], about: dict[str, Any], goals: Mapping[str, float]
) -> list[dict[str, Any]]:
    """How many times as fast ours is: the ratio of each round, then the median."""
    rows = []
    for who in took:
        if who.startswith("Glasshouse"):
            continue
        ratio = statistics.median(b / a for a, b in zip(took[OURS], took[who], strict=True))
        goal = goals.get(who)
        rows.append(
            row(
                f"{title}: {OURS}, times as fast",
                ratio,
                peer=who,
                peer_value=1.0,
                goal=None if goal is None else f">= {goal}",
                met=None if goal is None else ratio >= goal,
                **about,
            )
        )
    return rows


def speed_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model = random_model(SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "gpt2")
        hf32, hf16 = (hugging_face(f"{folder}/gpt2", d) for d in (torch.float32, torch.bfloat16))
    prompt = generator("bench", "generate").integers(0, SHAPE.vocab_size, size=32).tolist()
    difference = check_equal(model, hf32, prompt, arguments.new)
    print(f"same weights, same tokens: logits differ by at most {difference:.1e}")
    began = time.perf_counter()
    bf16 = Decoder(model, dtype=torch.bfloat16)
    laid_out = time.perf_counter() - began
    decoders = {OURS: bf16, OURS32: Decoder(model), INT8: Decoder(model, weights="int8")}
    peers = {PEER: (hf16, {}), PEER32: (hf32, {})}
    static = {"cache_implementation": "static", "disable_compile": True}
    try:
        theirs(hf16, [prompt], 2, **static)()
        peers["Hugging Face bf16, static cache"] = (hf16, static)
    except (ValueError, TypeError, RuntimeError) as problem:
        # Versions differ in which options they refuse and in what runs on a CPU. The default cache is the
        # comparison; this contestant is one more.
        print(f"their static cache does not run here: {problem}")
    rows = []
    batch = [generator("bench", "batch", n).integers(0, SHAPE.vocab_size, size=n).tolist() for n in RAGGED]
    peak = bandwidth()
    for title, prompts, goals in (("124M, batch 1", [prompt], GOALS), ("124M, batch 8 ragged", batch, {})):
        runs = {who: ours(d, prompts, arguments.new) for who, d in decoders.items()}
        runs |= {who: theirs(m, prompts, arguments.new, **o) for who, (m, o) in peers.items()}
        speed, took, about = race(title, runs, arguments.new * len(prompts), arguments)
        peak = max(peak, bandwidth())
        for who, rate in speed.items():
            size = {OURS: 2, INT8: 1, PEER: 2}.get(who.removesuffix(", static cache"), 4)
            matrices = 12 * SHAPE.n_layer * SHAPE.d_model**2 + SHAPE.vocab_size * SHAPE.d_model
            share = rate / len(prompts) * size * matrices / peak
            rows.append(
                row(
                    f"{title}: tokens per second, {who}",
                    round(rate, 1),
                    bandwidth_share=round(share, 3),
                    **about,
                )
            )
        rows += ratios(title, took, about, goals)
    rows.append(row("124M: seconds to lay out the weights in bf16, once", round(laid_out, 2)))
    rows.append(row("memory bandwidth, GB/s read", round(peak / 1e9, 1)))
    return rows


def int8_rows(text: Path, steps: int) -> list[dict[str, Any]]:
    """Loss in nats per byte of a small trained model on held-out text: fp32, bf16 and 8-bit weights."""
    raw = np.frombuffer(text.read_bytes(), dtype=np.uint8)
    if len(raw) < 50_000:
        raise SystemExit(f"{text} has {len(raw)} bytes; give a text of at least 50,000")
    cut = len(raw) * 9 // 10
    config = GPTConfig(vocab_size=256, context=128, d_model=192, n_layer=4, n_head=6, qk_norm=True)
    model = GPT(config).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rng = generator("bench", "int8")
    for step in range(steps):
        at = rng.integers(0, cut - 129, size=32)
        rows = torch.from_numpy(np.stack([raw[i : i + 129] for i in at]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = [raw[i : i + 128].tolist() for i in range(cut, len(raw) - 128, 128)][:400]
    per = {
        name: np.array([np.mean(s.logprobs) for s in score(twin.eval(), held)])
        for name, twin in (("fp32", model), ("int8 weights", int8_twin(model)))
    }
    coarse = GPT(config).to(torch.bfloat16)
    coarse.load_state_dict(model.state_dict())
    per["bf16"] = np.array([np.mean(s.logprobs) for s in score(coarse.eval(), held)])
    rows = []
    for name in ("bf16", "int8 weights"):
        change = per["fp32"] - per[name]
        rows.append(
            row(
                f"loss added by {name}, nats per byte",
                float(change.mean()),
                peer="fp32 loss",
                peer_value=float(-per["fp32"].mean()),
                stderr=float(change.std(ddof=1) / len(change) ** 0.5),
                n=len(change),
                text=text.name,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--new", type=int, default=NEW, help="tokens to generate")
    parser.add_argument("--text", type=Path, help="a text file: train on it, and measure what 8 bits cost")
    parser.add_argument("--steps", type=int, default=400, help="training steps on --text")
    parser.add_argument("--keep-disturbed", action="store_true", help="write results of a busy machine too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = speed_rows(arguments)
    if arguments.text:
        rows += int8_rows(arguments.text, arguments.steps)
    write("generate", rows)


if __name__ == "__main__":
    main()
