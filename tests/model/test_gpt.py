from __future__ import annotations

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import UsageError
from glasshouse.model import GPT, GPTConfig, Taps

TOKENS = torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(5))


def config(**changes) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 53, "context": 32, "d_model": 16, "n_layer": 2, "n_head": 4, **changes})


def test_sites_are_reached_in_the_order_they_are_listed(any_model):
    class Recorder(Taps):
        def __call__(self, site, x):
            order.append(site)
            return super().__call__(site, x)

    order: list[str] = []
    with torch.no_grad(), Recorder(read=["*"]) as taps:
        any_model(TOKENS, taps)
    assert order == any_model.sites()
    assert set(taps.acts) == set(any_model.sites())


@torch.no_grad()
def test_sites_have_the_shapes_that_their_names_promise(tiny):
    model = tiny("grouped")
    with Taps(read=["*"]) as taps:
        model(TOKENS, taps)
    stream, width = (2, 12, 16), model.config.mlp_width
    shapes = {
        **{
            "resid_pre": stream,
            "resid_mid": stream,
            "resid_post": stream,
            "attn_out": stream,
            "mlp_out": stream,
        },
        **{"q": (2, 4, 12, 4), "k": (2, 2, 12, 4), "v": (2, 2, 12, 4), "z": (2, 4, 12, 4)},
        **{"pattern": (2, 4, 12, 12), "mlp_pre": (2, 12, width), "mlp_post": (2, 12, width)},
    }
    for site, x in taps.acts.items():
        assert tuple(x.shape) == shapes.get(site.split(".")[-1], stream), site


@torch.no_grad()
def test_the_stream_is_the_sum_of_what_was_written_to_it(any_model):
    with Taps(read=["*"]) as taps:
        any_model(TOKENS, taps)
    total = taps["embed"]
    for i in range(any_model.config.n_layer):
        assert torch.equal(taps[f"blocks.{i}.resid_pre"], total)
        total = total + taps[f"blocks.{i}.attn_out"]
        assert torch.equal(taps[f"blocks.{i}.resid_mid"], total)
        total = total + taps[f"blocks.{i}.mlp_out"]
        assert torch.equal(taps[f"blocks.{i}.resid_post"], total)


@torch.no_grad()
def test_watching_changes_nothing_but_the_pattern_path_and_that_only_by_rounding(any_model):
    plain = any_model(TOKENS)
    cheap = [s for s in any_model.sites() if not s.endswith("pattern")]
    assert torch.equal(any_model(TOKENS, Taps(read=cheap)), plain)
    explicit = any_model(TOKENS, Taps(read=["blocks.*.pattern"]))
    assert torch.allclose(explicit, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pattern_rows_sum_to_one_and_look_only_back(any_model):
    with Taps(read=["blocks.*.pattern"]) as taps:
        any_model(TOKENS, taps)
    assert len(taps.acts) == any_model.config.n_layer
    for pattern in taps.acts.values():
        assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 12), atol=1e-6)
        assert (pattern.triu(1) == 0).all()
        assert (pattern >= 0).all()


@torch.no_grad()
def test_the_future_does_not_change_the_past(any_model):
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 53
    before, after = any_model(TOKENS), any_model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_order_matters(tiny, position):
    model = tiny(position=position)
    flipped = model(TOKENS.flip(1)[:, :])
    assert not torch.allclose(model(TOKENS)[:, -1], flipped[:, -1], atol=1e-3)
    one = model(torch.tensor([[3, 4, 5, 9]]))[:, -1]
    other = model(torch.tensor([[4, 3, 5, 9]]))[:, -1]
    assert not torch.allclose(one, other, atol=1e-4)


@torch.no_grad()
def test_rotary_scores_depend_on_distance_only(tiny):
    model = tiny("ours")
    row = torch.full((1, 9), 7)
    with Taps(read=["blocks.0.q", "blocks.0.k"]) as taps:
        model(row, taps)
    scores = taps["blocks.0.q"] @ taps["blocks.0.k"].transpose(-1, -2)  # one token everywhere
    for offset in range(9):
        along = scores.diagonal(-offset, dim1=-2, dim2=-1)
        assert torch.allclose(along, along[..., :1].expand_as(along), atol=1e-4)


def test_equal_seeds_give_equal_models_and_other_seeds_others():
    first, again, other = (GPT(config(qk_norm=True)).init_weights(s) for s in (3, 3, 4))
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_initialisation_is_what_its_table_says():
    wide = config(
        d_model=128, n_head=8, attn_bias=True, attn_out_bias=True, mlp_bias=True, mlp="gated", tied=False
    )
    for name, p in GPT(wide).init_weights(0).named_parameters():
        if p.ndim == 1:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith(("o.weight", "down.weight")):
            assert (p == 0).all(), name
        else:
            std = 0.02 if name in ("embed.weight", "head.weight") else 128**-0.5
            assert abs(float(p.detach().std()) / std - 1) < 0.05, name


@torch.no_grad()
def test_a_fresh_model_passes_the_embedding_through():
    model = GPT(config()).init_weights(0)
    with Taps(read=["embed", "blocks.1.resid_post"]) as taps:
        model(TOKENS, taps)
    assert torch.equal(taps["embed"], taps["blocks.1.resid_post"])


def test_tied_heads_share_and_untied_do_not(tiny):
    assert "head.weight" not in dict(tiny(tied=True).named_parameters())
    untied = tiny(tied=False)
    with torch.no_grad():
        before = untied(TOKENS)
        untied.head.weight.mul_(2)
        assert torch.allclose(untied(TOKENS), before * 2)


def test_too_long_a_sequence_is_refused(any_model):
    with pytest.raises(ValueError, match="33 positions exceed the model's context of 32"):
        any_model(torch.zeros(1, 33, dtype=torch.long))


@torch.no_grad()
def test_casting_keeps_the_rotary_tables_in_fp32(tiny):
    model = tiny("ours")
    exact = model.rope.clone()
    half = model.to(torch.bfloat16)
    assert half.rope.dtype == torch.float32 and torch.equal(half.rope, exact)
    assert half.embed.weight.dtype == torch.bfloat16
    assert half(TOKENS).dtype == torch.bfloat16


def test_every_parameter_gets_a_gradient(any_model):
    loss = torch.nn.functional.cross_entropy(any_model(TOKENS).flatten(0, 1), TOKENS.flatten())
    loss.backward()
    for name, p in any_model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        # a bias on all keys shifts every score of a query alike, so softmax does not see it
        assert p.grad.abs().sum() > 0 or name.endswith("k.bias"), name


@settings(max_examples=60, deadline=None)
@given(
    d_model=st.integers(1, 24),
    n_head=st.integers(1, 6),
    n_kv_head=st.none() | st.integers(1, 6),
    d_head=st.none() | st.integers(1, 9),
    position=st.sampled_from(["rotary", "learned"]),
    norm=st.sampled_from(["rms", "layer"]),
    mlp=st.sampled_from(["gated", "plain"]),
    qk_norm=st.booleans(),
    tied=st.booleans(),
)
def test_a_config_is_refused_or_runs(**features):
    """Whatever the validator lets through computes; nothing fails later with a shape error."""
    if features["mlp"] == "gated" and features["d_model"] == 0:
        return
    try:
        accepted = GPTConfig(vocab_size=7, context=5, n_layer=1, **features)
    except pydantic.ValidationError as error:
        assert "multiple" in str(error) or "even" in str(error)
        return
    logits = GPT(accepted).init_weights(0)(torch.tensor([[0, 6, 3, 3, 1]]))
    assert logits.shape == (1, 5, 7) and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_head": 3},
        {"n_kv_head": 3},
        {"d_head": 5},
        {"vocab_size": 1},
        {"n_layer": 0},
        {"norm_eps": 0.0},
        {"norm_eps": float("nan")},
        {"rope_theta": -1.0},
        {"activation": "swish2"},
        {"d_model": 16.0},
        {"tied": 1},
        {"windows": 3},
    ],
)
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        config(**wrong)


def test_an_unknown_site_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"blocks\.1\.resid_psot.*blocks\.1\.resid_post"):
        GPT(config()).init_weights(0)(TOKENS, Taps(read=["blocks.1.resid_psot"]))
