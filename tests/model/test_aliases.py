from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from glasshouse.base.errors import UsageError
from glasshouse.model import GPTConfig, Taps, load_hf
from glasshouse.model.aliases import aliases
from model.shapes import FITTING

# Written by TransformerLens from models that transformers saved; tests/parity/peers/hooks_side.py says how.
FIXTURES = Path(__file__).parent / "fixtures" / "transformer_lens"
TOKENS = torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def test_a_hook_name_reads_and_edits_the_site_it_stands_for(tiny):
    model = tiny("gpt2")
    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_q", "unembed.hook_in"]
    with Taps(
        read=[*names, "blocks.*.mlp.hook_post"], edit={"blocks.0.hook_mlp_out": torch.zeros_like}
    ) as taps:
        model(TOKENS, taps)
    with Taps(read=["*_post", "*.q", "final_norm"], edit={"blocks.0.mlp_out": torch.zeros_like}) as ours:
        model(TOKENS, ours)
    for name, site in zip(names, ["blocks.0.resid_post", "blocks.1.q", "final_norm"], strict=True):
        assert torch.equal(taps[name], ours[site])
        assert taps[name] is taps[site], "one tensor under both names"
    assert {s for s in taps.acts if s.endswith("mlp_post")} == {f"blocks.{i}.mlp_post" for i in range(3)}
    assert not taps["blocks.0.resid_post"].equal(model.embed(TOKENS))


@torch.no_grad()
def test_what_enters_the_unembedding_is_the_normed_raw_stream(tiny):
    model = tiny("gpt2")
    with Taps(read=["blocks.2.hook_resid_post", "unembed.hook_in"]) as taps:
        model(TOKENS, taps)
    x = taps["blocks.2.hook_resid_post"]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = normed * model.norm.weight + model.norm.bias
    assert torch.allclose(taps["unembed.hook_in"], expected, atol=1e-5)
    assert not torch.allclose(x.mean(-1), torch.zeros(()), atol=1e-3), "residuals are raw, not centred"
    assert torch.allclose(F.linear(expected, model.head_weight), model(TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "name", "nearest", "why"),
    [
        ("gpt2", "hook_embed", "embed", "contains the positions"),
        ("gpt2", "blocks.1.attn.hook_rot_q", None, "no site"),
        ("ours", "blocks.1.attn.hook_q", "blocks.1.q", "before rotary positions and QK-norm; ours is after"),
        ("grouped", "blocks.1.attn.hook_k", "blocks.1.k", "before rotary positions; ours is after"),
        ("ours", "ln_final.hook_normalized", "final_norm", "before the norm's gain"),
        ("gpt2", "ln_final.hook_normalized", "final_norm", "before the norm's gain and bias"),
        ("ours", "blocks.2.attn.hook_attn_scores", "blocks.2.pattern", "before the softmax"),
        ("ours", "blocks.0.attn.hook_result", "blocks.0.z", "each head's output"),
        ("ours", "blocks.*.hook_*_input", "blocks.0.resid_pre", "asked for by 'blocks.*.hook_*_input'"),
        ("ours", "unembed.hook_out", "final_norm", "the logits"),
        ("ours", "hook_pos_embed", "embed", "rotary model has none"),
    ],
)
def test_a_tensor_that_we_do_not_form_is_refused_with_the_nearest(tiny, shape, name, nearest, why):
    with pytest.raises(UsageError) as refusal:
        tiny(shape)(TOKENS, Taps(read=[name]))
    assert why in str(refusal.value)
    if nearest is not None:
        assert f"nearest site is {nearest!r}" in str(refusal.value)


def test_a_misspelt_hook_name_gets_the_nearest(tiny):
    with pytest.raises(UsageError, match=r"Did you mean 'blocks\.0\.hook_resid_post'"):
        tiny()(TOKENS, Taps(read=["blocks.0.hook_resid_pst"]))
    with pytest.raises(UsageError, match="was not read"), Taps(read=["blocks.0.hook_resid_post"]) as taps:
        tiny()(TOKENS, taps)
        taps["blocks.1.hook_resid_post"]


@torch.no_grad()
def test_one_taps_does_not_carry_names_from_one_model_to_another(tiny):
    with Taps(read=["blocks.0.attn.hook_q"]) as taps:
        tiny("gpt2")(TOKENS, taps)
        with pytest.raises(UsageError, match="before rotary"):
            tiny("ours")(TOKENS, taps)  # the sites are the same, the tensors are not
        tiny("gpt2")(TOKENS, taps)


@pytest.mark.parametrize("family", sorted(FITTING))
def test_every_alias_of_every_family_is_a_site_and_no_name_is_both_exact_and_near(family, tiny):
    shape, features = FITTING[family]
    model = tiny(shape, **features)
    names = model.hook_names()
    assert set(names.exact.values()) <= set(model.sites())
    assert {site for site, _ in names.near.values()} <= set(model.sites())
    assert not names.exact.keys() & names.near.keys()
    stream = {f"blocks.{i}.hook_resid_{end}" for i in range(3) for end in ("pre", "post")}
    assert stream <= names.exact.keys()


@pytest.mark.parametrize("family", sorted(FITTING))
@torch.no_grad()
def test_taps_see_and_edit_every_site_of_every_family(family, tiny):
    shape, features = FITTING[family]
    model = tiny(shape, **features)
    config, plain = model.config, model(TOKENS)
    with Taps(read=["*"]) as taps:
        model(TOKENS, taps)
    stream, heads = (2, 12, 16), {"q": config.n_head, "k": config.kv_heads, "v": config.kv_heads}
    expected = {"pattern": (2, 4, 12, 12), "z": (2, 4, 12, config.head_width)}
    expected |= {site: (2, n, 12, config.head_width) for site, n in heads.items()}
    expected |= {site: (2, 12, config.mlp_width) for site in ("mlp_pre", "mlp_post")}
    for site in model.sites():
        assert tuple(taps[site].shape) == expected.get(site.split(".")[-1], stream), site
        with Taps(edit={site: lambda x: x * torch.linspace(0.3, 1.5, x.shape[-1])}) as edited:
            assert not torch.allclose(model(TOKENS, edited), plain, atol=1e-4), site


@pytest.mark.parametrize(
    "site", ["embed", "blocks.1.resid_pre", "blocks.1.q", "blocks.1.pattern", "blocks.1.mlp_pre"]
)
@torch.no_grad()
def test_stopping_at_a_site_inside_a_block_runs_no_later_block(site, tiny):
    model = tiny()
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda m, *_: ran.append(m.layer)) for b in model.blocks]
    with Taps(read=[site], stop_early=True) as taps:
        out = model(TOKENS, taps)
    for handle in handles:
        handle.remove()
    assert ran == ([] if site == "embed" else [0, 1])
    assert out.shape == (2, 12, 16)
    with Taps(read=[site]) as whole:
        model(TOKENS, whole)
    assert torch.equal(taps[site], whole[site])


def test_names_of_equal_shapes_are_made_once():
    config = GPTConfig(vocab_size=5, context=4, d_model=4, n_layer=1, n_head=2)
    assert aliases(config) is aliases(GPTConfig(vocab_size=5, context=4, d_model=4, n_layer=1, n_head=2))


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "qwen3"])
@torch.no_grad()
def test_an_alias_holds_what_transformer_lens_holds_under_that_name(family):
    theirs = load_file(FIXTURES / family / "activations.safetensors")
    model = load_hf(FIXTURES / family)
    names = model.hook_names()
    present = sorted(names.exact.keys() & theirs.keys())
    with Taps(read=[*model.sites()]) as ours:
        model(theirs["tokens"], ours)

    def in_their_order(site: str) -> torch.Tensor:
        heads = site.split(".")[-1] in ("q", "k", "v", "z")
        return ours[site].transpose(1, 2) if heads else ours[site]

    for name in present:
        assert torch.allclose(in_their_order(names.exact[name]), theirs[name], atol=2e-5), name
    extra = names.exact.keys() - theirs.keys()
    assert extra <= {"unembed.hook_in"}, "of the bridge that follows HookedTransformer"
    known = names.exact.keys() | names.near.keys() | {"tokens"}
    assert theirs.keys() - known <= {
        f"blocks.{i}.attn.{n}_norm.hook_{x}" for i in range(2) for n in "qk" for x in ("scale", "normalized")
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "qwen3"])
@torch.no_grad()
def test_a_name_is_refused_only_where_the_nearest_site_holds_other_numbers(family):
    theirs = load_file(FIXTURES / family / "activations.safetensors")
    model = load_hf(FIXTURES / family)
    with Taps(read=["*"]) as ours:
        model(theirs["tokens"], ours)
    for name, (site, _) in model.hook_names().near.items():
        if name in theirs:
            x = ours[site].transpose(1, 2) if site.split(".")[-1] in ("q", "k", "z") else ours[site]
            assert x.shape != theirs[name].shape or not torch.allclose(x, theirs[name], atol=1e-3), name
