"""What monitors measure is right on models where the answer is known, and looking changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.train.monitor import (
    Monitor,
    activations,
    attention_entropy,
    attention_logit,
    dead_units,
    gradient_noise,
    ratio,
    rms,
    sampled_weights,
)
from glasshouse.train.objective import Loss, TensorBatch, next_token
from glasshouse.train.step import backward
from stirred import stirred
from train.tiny import stages, train

LAYERED = ("resid_rms", "attn_entropy", "attn_entropy_min", "attn_logit_max", "dead_units", "update_ratio")
CONFIG = GPTConfig(vocab_size=32, context=16, d_model=16, n_layer=2, n_head=2, qk_norm=True)


def model(**changes: Any) -> GPT:
    return stirred(GPT(CONFIG.model_copy(update=changes)).init_weights(3), 5, 0.05)


def batch(rows: int = 8) -> TensorBatch:
    tokens = torch.randint(32, (rows, 16), generator=torch.Generator().manual_seed(rows))
    return TensorBatch(tokens, tokens.roll(-1, 1), torch.ones(rows, 16), rows * 16)


# -- looking changes nothing ---------------------------------------------------------------------------------


def test_losses_and_weights_are_the_same_bits_with_and_without_monitors(tmp_path: Path) -> None:
    losses, files = [], []
    for every in (0, 1):
        folder = tmp_path / str(every)
        outcome = train(folder, stages=stages(0, monitor_every=every)[:1])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["loss"], row["grad_norm"]) for row in lines if row["kind"] == "train"])
        seen = [row for row in lines if row["kind"] == "monitor"]
        assert [row["step"] for row in seen] == (list(range(1, 13)) if every else [])
        files.append(outcome.checkpoint.artifacts)
    assert losses[0] == losses[1]
    assert files[0] == files[1]  # optimiser and detector too


def test_a_look_leaves_gradients_and_the_random_state_alone() -> None:
    watched, rows = model(), batch()
    backward(watched, next_token, rows, "fp32")
    before = {name: p.grad.clone() for name, p in watched.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    Monitor(watched).before(next_token, rows, "fp32", 1.0)
    assert all(
        torch.equal(p.grad, before[name]) for name, p in watched.named_parameters() if p.grad is not None
    )
    assert torch.equal(torch.get_rng_state(), random) and watched.training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gated", "activation": "silu", "n_kv_head": 1},
        {"norm": "layer", "position": "learned", "parallel": True, "activation": "gelu"},
        {"attn_softcap": 20.0, "window_tokens": 4, "norm_place": "both"},
        {"causal": False, "norm_place": "post", "activation": "relu"},
    ],
)
def test_every_architecture_can_be_watched(changes: dict[str, Any], dtype: str) -> None:
    watched, rows = model(**changes), batch()
    backward(watched, next_token, rows, dtype)
    monitor = Monitor(watched)
    monitor.before(next_token, rows, dtype, 1.0)
    row = monitor.after()
    for key in LAYERED:
        assert len(row[key]) == 2 and all(math.isfinite(x) and x >= 0 for x in row[key]), key
    assert all(
        0 <= x <= 1 + 1e-5 for key in ("attn_entropy", "attn_entropy_min", "dead_units") for x in row[key]
    )
    json.dumps(row, allow_nan=False)


# -- and what it says is right -------------------------------------------------------------------------------


def test_activation_norms_are_those_of_the_stream() -> None:
    watched, rows = model(), batch(2)
    with torch.no_grad(), Taps(read=["blocks.*.resid_post"]) as taps:
        watched(rows.tokens, taps)
    expected = [float(taps[f"blocks.{i}.resid_post"].square().mean().sqrt()) for i in range(2)]
    assert activations(watched, rows.tokens, "fp32")["resid_rms"] == pytest.approx(expected, rel=1e-5)


def test_even_attention_has_all_the_entropy_and_a_single_focus_none() -> None:
    T = 6
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    focus = torch.eye(T) * 0.999999 + torch.ones(T, T).tril() * 1e-9
    pattern = torch.stack([even, focus])[None]
    assert attention_entropy(pattern).tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_attention_over_a_single_position_counts_for_nothing() -> None:
    assert attention_entropy(torch.eye(3)[None, None]).tolist() == [0.0]


def test_the_largest_attention_logit_is_that_of_a_key_that_is_seen() -> None:
    watched = model()
    with torch.no_grad(), Taps(read=["blocks.0.q", "blocks.0.k", "blocks.0.pattern"]) as taps:
        watched(batch(2).tokens, taps)
    found = float(attention_logit(watched, taps, 0))
    q, k = taps["blocks.0.q"], taps["blocks.0.k"]
    logits = [
        abs(float(q[b, h, t] @ k[b, h, s])) / math.sqrt(8)
        for b in range(2) for h in range(2) for t in range(16) for s in range(t + 1)
    ]  # fmt: skip
    assert found == pytest.approx(max(logits), rel=1e-5)


def test_units_that_never_speak_are_counted() -> None:
    post = torch.randn(2, 8, 10).abs()
    post[..., :3] = 0.0
    assert float(dead_units(post)) == pytest.approx(0.3)
    assert float(dead_units(torch.zeros(2, 8, 10))) == 1.0


def test_units_killed_in_a_model_are_seen_in_their_layer() -> None:
    watched = model(mlp_bias=True, activation="relu")
    with torch.no_grad():
        watched.blocks[1].mlp.up.weight[:16] = 0.0
        watched.blocks[1].mlp.up.bias[:16] = -1.0
    dead = activations(watched, batch().tokens, "fp32")["dead_units"]
    assert dead[1] >= 0.25 and dead[0] < 0.2


def test_output_logits_and_their_normaliser_are_seen() -> None:
    watched, rows = model(), batch(4)
    with torch.no_grad():
        logits = watched(rows.tokens).flatten(0, 1)[-64:]
    row = activations(watched, rows.tokens, "fp32")
    assert row["logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-4)
    assert row["log_z"] == pytest.approx(float(logits.logsumexp(-1).square().mean().sqrt()), rel=1e-4)


def test_the_update_ratio_is_that_of_the_whole_matrices() -> None:
    big = GPT(GPTConfig(vocab_size=8, context=8, d_model=128, n_layer=1, n_head=2)).init_weights(0)
    with torch.no_grad():
        for p in big.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    was = [[w.clone() for w in layer] for layer in sampled_weights(big)]
    whole = [p.detach().clone() for p in big.blocks[0].parameters() if p.ndim == 2]
    with torch.no_grad():
        for p in big.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1 + p.numel())), alpha=0.01)
    now = [p.detach() for p in big.blocks[0].parameters() if p.ndim == 2]
    exact = math.sqrt(
        sum(float((a - b).square().mean()) for a, b in zip(now, whole, strict=True))
        / sum(float(b.square().mean()) for b in whole)
    )
    found = ratio(sampled_weights(big)[0], was[0])
    assert found == pytest.approx(exact, rel=0.05)
    assert ratio([torch.ones(3)], [torch.zeros(3)]) is None


def test_the_noise_scale_is_right_where_it_is_known() -> None:
    """Rows whose gradients are a common vector plus independent noise: the scale is noise over signal."""
    width, signal, spread, rows = 200, 0.3, 1.0, 64

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(width))
            self.device = torch.device("cpu")

    def objective(model: Any, batch: TensorBatch) -> Loss:
        generator = torch.Generator()
        slopes = []
        for token in batch.tokens[:, 0].tolist():
            generator.manual_seed(token)
            slopes.append(signal + spread * torch.randn(width, generator=generator))
        total = (torch.stack(slopes) @ model.w).mean()
        return Loss(total, {"lm": total})

    estimates = []
    for draw in range(30):
        tokens = torch.arange(rows)[:, None] + 1000 * draw
        whole = TensorBatch(tokens, tokens, torch.ones(rows, 1), rows)
        linear = Linear()
        objective(linear, whole).total.backward()  # type: ignore[no-untyped-call]
        assert linear.w.grad is not None
        estimates.append(gradient_noise(linear, objective, whole, "fp32", float(linear.w.grad.norm())))  # type: ignore[arg-type]
    trace = sum(e["noise_trace"] for e in estimates) / len(estimates)
    squared = sum(e["noise_signal"] for e in estimates) / len(estimates)
    assert squared == pytest.approx(width * signal**2, rel=0.1)
    assert trace == pytest.approx(width * spread**2, rel=0.1)


def test_too_few_rows_have_no_noise_scale() -> None:
    assert gradient_noise(model(), next_token, batch(3), "fp32", 1.0) == {}
    assert gradient_noise(model(), next_token, batch(8), "fp32", 1.0, accumulate=16) == {}


def test_rms_of_a_bf16_tensor_does_not_overflow() -> None:
    assert float(rms(torch.full((4,), 3e4, dtype=torch.bfloat16))) == pytest.approx(3e4, rel=0.01)
