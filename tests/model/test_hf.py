from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.config import RopeScaling
from glasshouse.model.families import FAMILIES, family_for
from glasshouse.model.family import obstacles
from glasshouse.model.generate import last_logits
from glasshouse.model.hf import load_hf, read_config, save_hf
from glasshouse.model.weights import SINGLE, read_safetensors, write_safetensors
from model.shapes import FITTING

TOKENS = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=sorted(FITTING))
def folder(request: pytest.FixtureRequest, tiny, tmp_path) -> Path:
    shape, changes = FITTING[request.param]
    assert save_hf(tiny(shape, **changes), tmp_path / "m") == request.param
    return tmp_path / "m"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = read_safetensors(folder / SINGLE)
    change(tensors)
    write_safetensors(folder / SINGLE, tensors)


@torch.no_grad()
def test_saving_and_loading_changes_no_bit(tiny, folder):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    shape, changes = FITTING[family]
    model, back = tiny(shape, **changes), load_hf(folder)
    assert torch.equal(back(TOKENS), model(TOKENS))
    assert all(p.requires_grad for p in back.parameters())


def test_equal_models_give_equal_bytes(tiny, tmp_path):
    for name in ("one", "two"):
        save_hf(tiny("gpt2"), tmp_path / name)
    for file in (SINGLE, "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_half_precision_is_kept_when_saved(tiny, tmp_path):
    save_hf(tiny("grouped").to(torch.bfloat16), tmp_path / "m")
    assert {x.dtype for x in read_safetensors(tmp_path / "m" / SINGLE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_hf(tmp_path / "m").embed.weight.dtype == torch.float32


def test_a_model_that_fits_no_family_says_what_stands_in_the_way(tiny, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        save_hf(tiny("ours"), tmp_path / "m")
    message = str(caught.value)
    assert "llama: mlp is 'plain' (needs 'gated')" in message
    assert "qwen3: mlp is 'plain'" in message
    assert "gpt2: norm is 'rms' (needs 'layer')" in message
    assert not (tmp_path / "m").exists()


def test_a_family_asked_for_is_the_only_one_tried(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="gpt2: ") as caught:
        save_hf(tiny("grouped"), tmp_path / "m", family="gpt2")
    assert "llama" not in str(caught.value)
    with pytest.raises(UsageError, match="no family 'mamba'"):
        save_hf(tiny("grouped"), tmp_path / "m", family="mamba")  # type: ignore[arg-type]


def test_a_folder_with_a_model_is_not_overwritten(tiny, folder):
    with pytest.raises(UsageError, match="already"):
        save_hf(tiny("grouped"), folder)


FEATURES = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["rms", "layer"]),
        "position": st.sampled_from(["rotary", "learned"]),
        "mlp": st.sampled_from(["gated", "plain"]),
        "activation": st.sampled_from(["gelu", "gelu_tanh", "silu", "relu", "relu2"]),
        "attn_bias": st.booleans(),
        "attn_out_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "tied": st.booleans(),
        "n_kv_head": st.sampled_from([None, 1, 2]),
        "d_head": st.sampled_from([None, 2, 6]),
        "norm_place": st.sampled_from(["pre", "post", "both"]),
        "norm_offset": st.booleans(),
        "parallel": st.booleans(),
        "causal": st.booleans(),
        "rope_fraction": st.sampled_from([1.0, 0.5]),
        "rope_scaling": st.sampled_from([None, RopeScaling(kind="linear", factor=3.0)]),
        "rope_theta_window": st.sampled_from([None, 70.0]),
        "window_tokens": st.sampled_from([None, 3]),
        "full_layers": st.sampled_from([(), (0,), (1,), (0, 1)]),
        "qk_norm_span": st.sampled_from(["head", "all"]),
        "attn_scale": st.sampled_from([None, 9**-0.5, 0.3]),
        "attn_softcap": st.sampled_from([None, 2.0]),
        "logit_softcap": st.sampled_from([None, 2.0]),
        "embed_scale": st.sampled_from([None, 8**0.5]),
        "value_residual": st.booleans(),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(features=FEATURES, want=st.sampled_from(["any", *sorted(FAMILIES)]), data=st.data())
@torch.no_grad()
def test_every_config_is_exported_exactly_or_refused(tmp_path_factory, features, want, data):
    if want != "any":  # one family's features with at most one of another kind: what an export must notice
        family = FAMILIES[want]
        odd = data.draw(st.sampled_from([None, *sorted(features)]))
        kept = {f: v for f, v in features.items() if f in family.free or f == odd}
        features = {**family.needs, **kept, **({"embed_scale": 8**0.5} if family.embed_root else {})}
        features |= {f: features[other] for f, other in family.follows.items() if odd is not None}
    try:
        config = GPTConfig(vocab_size=53, context=16, d_model=8, n_layer=2, n_head=2, **features)
    except ValueError:
        return  # features that contradict each other
    model = GPT(config).init_weights(1)
    for i, p in enumerate(model.parameters()):
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    folder = tmp_path_factory.mktemp("x") / "m"
    try:
        save_hf(model, folder)
    except CheckpointError:
        assert all(obstacles(model.config, family) for family in FAMILIES.values())
        return
    assert torch.equal(load_hf(folder)(TOKENS), model(TOKENS))


def test_a_feature_that_no_table_mentions_is_refused_by_every_family(tiny, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        save_hf(tiny("grouped", value_residual=True), tmp_path / "m")
    assert str(caught.value).count("value_residual is True (needs False)") == len(FAMILIES)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "llama": [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters differ"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        ({"rope_scaling": {**LLAMA3, "factor": -1.0}}, "rope_scaling.factor must be a number above 0"),
        ({"rope_scaling": {**LLAMA3, "beta": 1.0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type default, linear"),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": ["default"], "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "not supported for llama"),
        ({"rope_theta": 5.0}, "given twice"),
        ({"rope_theta": "big", "rope_parameters": None}, "must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "sliding-window"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu' is not supported; supported: silu"),
        ({"hidden_act": None}, "activation None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"attention_bias": "yes"}, "attn_bias"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": 2**40}, "beyond the limit"),
        ({"num_key_value_heads": 2**40}, "beyond the limit"),
        ({"num_hidden_layers": 10**9}, "beyond the limit"),
        ({"num_hidden_layers": 0}, "n_layer must be a whole number"),
        ({"num_hidden_layers": True}, "n_layer must be a whole number"),
        ({"max_position_embeddings": 10**12}, "beyond the limit"),
        (
            {"vocab_size": 54},
            r"'model.embed_tokens.weight' has shape \[53, 16\], not \[54, 16\] as config.json",
        ),
        ({"vocab_size": 54}, r"\(vocab_size = 54, hidden_size = 16\)"),
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight' has shape \[8, 16\], not \[16, 16\].*num_key_value_heads = 4",
        ),
        ({"intermediate_size": 8}, r"intermediate_size = 8"),
        ({"num_hidden_layers": 4}, "the weights have 3 layers, not 4.*num_hidden_layers = 4"),
        ({"num_hidden_layers": 2}, "the weights have 3 layers, not 2.*num_hidden_layers = 2"),
        ({"mlp_bias": True}, "missing, first 'model.layers.0.mlp.down_proj.bias'"),
        ({"model_type": "qwen2", "mlp_bias": None}, "attention_bias = False .*not supported for qwen2"),
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama, qwen3, gpt2, qwen2, mistral"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
    ],
    "qwen3": [
        ({"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
        ({"layer_types": ["chunked_attention"] * 3}, "supported: full_attention, sliding_attention"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, but there are 3"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a whole number"),
        ({"attention_bias": True}, "missing"),
        ({"head_dim": 8}, "has shape"),
    ],
    "mistral": [
        ({"layer_types": ["full_attention"] * 3}, "whose layers are alike"),
        ({"sliding_window": "all"}, "sliding_window must be a whole number or null, not 'all'"),
    ],
    "gpt_neox": [
        ({"rotary_pct": 0.25}, "given twice"),
        ({"rotary_pct": None, "rope_parameters": None}, "even number of dimensions"),
        (
            {"rotary_emb_base": None, "rope_parameters": None, "rope_theta": 7.0},
            "rope_theta = 7.0 has no effect",
        ),
        ({"use_parallel_residual": "no"}, "parallel"),
        ({"num_attention_heads": 8}, "even number"),
    ],
    "gemma2": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0"),
        ({"attn_logit_softcapping": -3.0}, "attn_softcap"),
    ],
    "gemma3_text": [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ({"rope_parameters": {"rope_type": "default"}}, "not supported for gemma3_text"),
        ({"rope_local_base_freq": 9.0}, "given twice"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "must have rope_type default",
        ),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be a whole number"),
        ({"model_type": "gemma3"}, "text_config must be an object"),
    ],
    "gpt2": [
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not supported; supported: True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "mish"}, "'mish' is not supported"),
        ({"n_inner": 60}, "c_fc.bias' has shape|has shape .*n_inner = 60"),
        ({"rope_theta": 10000.0}, "rope_theta"),
    ],
}


@pytest.mark.parametrize(
    ("family", "changes", "message"), [(f, c, m) for f, cases in REFUSED.items() for c, m in cases]
)
def test_what_is_not_computed_here_is_refused_by_name(tiny, tmp_path, family, changes, message):
    shape, features = FITTING[family]
    save_hf(tiny(shape, **features), tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_hf(tmp_path / "m")


def test_a_key_known_to_be_harmless_can_be_ignored(folder):
    edit_config(folder, colour="green", _name_or_path="x", nothing=None)
    with pytest.raises(CheckpointError, match=r"colour = 'green'.*ignore=\['colour'\]"):
        load_hf(folder)
    load_hf(folder, ignore=["colour"])


def test_defaults_that_a_config_leaves_out_are_the_familys():
    wanted = {"llama": (1e-6, False), "qwen3": (1e-6, False), "gpt2": (1e-5, True)}
    for name, (eps, tied) in wanted.items():
        keys = FAMILIES[name].keys
        defaults = {feature: default for feature, default in keys.values()}
        assert (defaults["norm_eps"], defaults["tied"]) == (eps, tied)


def test_a_missing_or_wrong_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_hf(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_hf(tmp_path)


def test_a_damaged_weight_file_is_refused(folder):
    path = folder / SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_hf(folder)
    path.write_bytes(whole)
    edit_weights(folder, lambda t: t[sorted(t)[0]].view(-1)[0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="NaN"):
        load_hf(folder)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tiny, tmp_path):
    save_hf(tiny("grouped", tied=True), tmp_path / "m")
    embed = "model.embed_tokens.weight"
    edit_weights(tmp_path / "m", lambda t: t.update({"lm_head.weight": t[embed].clone()}))
    load_hf(tmp_path / "m")  # a harmless copy
    edit_weights(tmp_path / "m", lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load_hf(tmp_path / "m")


@torch.no_grad()
def test_old_gpt2_files_without_prefix_and_with_mask_buffers_are_read(tiny, tmp_path):
    model = tiny("gpt2")
    save_hf(model, tmp_path / "m")

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_weights(tmp_path / "m", age)
    assert torch.equal(load_hf(tmp_path / "m")(TOKENS), model(TOKENS))
    edit_weights(tmp_path / "m", lambda t: t.update({"h.0.attn.surprise": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="surprise"):
        load_hf(tmp_path / "m")


def test_a_shorter_context_can_be_asked_for(tiny, folder):
    whole, short = load_hf(folder), load_hf(folder, context=10)
    assert short.config.context == 10
    prompt = [TOKENS[0].tolist()]
    assert torch.equal(last_logits(short, prompt), last_logits(whole, prompt))
    with pytest.raises(UsageError, match="context of 10"):
        last_logits(short, [[1] * 11])
    for wrong in (0, 33):
        with pytest.raises(UsageError, match=r"1\.\.32"):
            load_hf(folder, context=wrong)


@torch.no_grad()
def test_a_loaded_model_can_be_cast_and_moved(folder):
    model = load_hf(folder).to(torch.bfloat16)
    assert model(TOKENS).dtype == torch.bfloat16
    assert torch.allclose(model.float()(TOKENS), load_hf(folder)(TOKENS), atol=0.2)


def test_configs_alone_can_be_read(folder):
    config, family = read_config(folder / "config.json")
    assert family_for(config) is family
