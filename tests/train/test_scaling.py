"""The dial's rules: what they count, what yields to what, and that bigger models are given more."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.model import GPT, GPTConfig
from glasshouse.train import scaling
from glasshouse.train.config import StageConfig


def config(depth: int, **changes: Any) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 300, "context": 64, **scaling.shape(depth), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gated", "activation": "silu"},
        {"n_kv_head": 1},
        {"d_head": 16},
        {"d_mlp": 80},
        {"tied": False},
    ],
)
def test_n_is_the_number_of_weights_in_matrix_products(changes: dict[str, Any]) -> None:
    model = GPT(config(2, **changes))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight")
    assert scaling.matrix_parameters(model.config) == matrices + (
        model.embed.weight.numel() if model.config.tied else 0
    )


def test_a_deeper_model_is_wider_and_is_given_more_tokens_in_larger_batches() -> None:
    shapes = [scaling.shape(depth) for depth in range(2, 13)]
    assert all(a["d_model"] < b["d_model"] for a, b in itertools.pairwise(shapes))
    found = [scaling.horizon(config(depth), {}) for depth in range(2, 9)]
    tokens = [f.steps * f.batch_size for f in found]
    assert tokens == sorted(set(tokens))
    assert [f.batch_size for f in found] == sorted(f.batch_size for f in found)


@given(st.integers(1, 12), st.floats(0.01, 100))
def test_the_horizon_is_the_ratio_asked_for_and_every_number_makes_a_stage(depth: int, ratio: float) -> None:
    shaped = config(depth)
    found = scaling.horizon(shaped, {}, ratio)
    wanted = ratio * scaling.matrix_parameters(shaped)
    batch = found.batch_size * shaped.context
    assert wanted <= found.steps * batch < wanted + batch
    StageConfig(name="pretrain", **vars(found))


def test_explicit_numbers_are_kept_and_the_others_follow_them() -> None:
    free = scaling.horizon(config(3), {})
    larger = scaling.horizon(config(3), {"batch_size": 4 * free.batch_size})
    assert larger.batch_size == 4 * free.batch_size
    assert larger.steps == pytest.approx(free.steps / 4, abs=1)
    assert larger.muon_lr / free.muon_lr == pytest.approx(2.0, rel=0.05)  # the square root of the batch
    fixed = {"steps": 7, "batch_size": 3, "muon_lr": 0.5, "adam_lr": 0.25, "weight_decay": 0.125}
    assert vars(scaling.horizon(config(3), fixed)) == fixed


def test_weight_decay_keeps_its_timescale_when_steps_or_rate_change() -> None:
    short, long = (scaling.horizon(config(3), {"steps": n, "batch_size": 8}) for n in (400, 1600))
    assert short.weight_decay * short.muon_lr * 400 == pytest.approx(
        long.weight_decay * long.muon_lr * 1600, rel=0.02
    )


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_is_no_horizon_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        scaling.horizon(config(2), {}, ratio)
