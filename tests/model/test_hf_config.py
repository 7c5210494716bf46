"""Configs as they lie in released folders, of every family: what they mean is read and nothing is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.errors import CheckpointError
from glasshouse.model.config import GPTConfig, RopeScaling
from glasshouse.model.hf_config import read_config, write_config

USUAL: dict[str, Any] = {
    **{"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True, "pretraining_tp": 1},
}
LLAMA_3_2 = {
    **USUAL,
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False},
    **{"head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192},
    **{"max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32},
    **{"num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0},
    "rope_scaling": {
        **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
        "original_max_position_embeddings": 8192,
    },
    **{"tie_word_embeddings": True, "vocab_size": 128256},
}
QWEN_2_5 = {
    **USUAL,
    **{"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864},
    **{"max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14},
    **{"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
    **{"sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True},
    **{"use_mrope": None, "vocab_size": 151936},
}
QWEN_3 = {
    **USUAL,
    **{"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960},
    **{"max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000},
    **{"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True},
    "vocab_size": 151936,
}
PYTHIA = {
    **USUAL,
    **{"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048},
    **{"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8},
    **{"num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "classifier_dropout": 0.1},
    **{"tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304},
}
MISTRAL = {
    **USUAL,
    **{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
    **{"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096},
    **{"tie_word_embeddings": False, "vocab_size": 32000},
}
GEMMA_2 = {
    **USUAL,
    **{"model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0},
    **{"cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256},
    **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304},
    **{"intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8},
    **{"num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256},
    **{"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000},
}
GEMMA_3 = {
    **USUAL,
    **{"model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None},
    **{"cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256},
    **{"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912},
    **{"max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26},
    **{"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06},
    **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512},
    **{"sliding_window_pattern": 6, "vocab_size": 262144},
}
GEMMA_3_MULTIMODAL = {
    **{"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    **{"boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106]},
    **{"image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256},
    "text_config": {
        **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"},
        **{"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0"},
}
OLMO_2 = {
    **USUAL,
    **{"model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048},
    **{"intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16},
    **{"num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
}
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-3.2": (
        LLAMA_3_2,
        {
            "rope_theta": 500000.0,
            "rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_context=8192),
            "window_tokens": None,
        },
    ),
    "qwen-2.5": (QWEN_2_5, {"attn_bias": True, "attn_out_bias": False, "window_tokens": None}),
    "qwen-3": (QWEN_3, {"qk_norm": True, "rope_theta": 1e6, "head_width": 128, "window_tokens": None}),
    "pythia": (PYTHIA, {"parallel": True, "rotated": 16, "attn_bias": True, "mlp_width": 2048}),
    "mistral": (MISTRAL, {"window_tokens": 4096, "full_layers": ()}),
    "gemma-2": (
        GEMMA_2,
        {
            **{"window_tokens": 4096, "full_layers": tuple(range(1, 26, 2)), "embed_scale": 48.0},
            **{"attn_softcap": 50.0, "logit_softcap": 30.0, "attn_scale": 1 / 16, "tied": True},
        },
    ),
    "gemma-3": (
        GEMMA_3,
        {
            **{"window_tokens": 512, "full_layers": (5, 11, 17, 23), "rope_theta": 1e6},
            **{"rope_theta_window": 1e4, "attn_softcap": None, "logit_softcap": None, "qk_norm": True},
        },
    ),
    "gemma-3-multimodal": (
        GEMMA_3_MULTIMODAL,
        {
            **{"n_head": 8, "kv_heads": 4, "head_width": 256, "vocab_size": 262208, "context": 131072},
            **{"rope_scaling": RopeScaling(kind="linear", factor=8.0), "rope_theta": 1e6, "tied": True},
            "full_layers": (5, 11, 17, 23, 29),
        },
    ),
    "olmo-2": (OLMO_2, {"norm_place": "post", "qk_norm_span": "all", "rope_theta": 5e5}),
}


def read(folder: Path, config: dict[str, Any]) -> GPTConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder / "config.json")[0]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_configs_are_understood(tmp_path, name):
    raw, wanted = RELEASED[name]
    config = read(tmp_path, raw)
    for feature, value in wanted.items():
        assert getattr(config, feature) == value, feature


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_what_is_written_of_a_config_is_read_as_the_same(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name][0]))
    config, family = read_config(tmp_path / "config.json")
    back = read(tmp_path, write_config(config, family))
    resolved = {"n_kv_head": config.kv_heads, "d_head": config.head_width, "d_mlp": config.mlp_width}
    assert back == config.model_copy(update={k: v for k, v in resolved.items() if getattr(back, k) == v})


def test_an_absent_key_is_the_familys_default_and_null_is_none(tmp_path):
    mistral = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert read(tmp_path, mistral).window_tokens == 4096
    assert read(tmp_path, {**mistral, "sliding_window": None}).window_tokens is None
    gemma = {key: value for key, value in GEMMA_2.items() if not key.endswith("softcapping")}
    assert (read(tmp_path, gemma).attn_softcap, read(tmp_path, gemma).logit_softcap) == (50.0, 30.0)
    assert read(tmp_path, {**gemma, "attn_logit_softcapping": None}).attn_softcap is None


def test_both_generations_of_rotary_keys_mean_the_same(tmp_path):
    scaling = LLAMA_3_2["rope_scaling"]
    rest = {key: value for key, value in LLAMA_3_2.items() if key not in ("rope_scaling", "rope_theta")}
    new = {**rest, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    assert read(tmp_path, new) == read(tmp_path, LLAMA_3_2)
    old = {key: value for key, value in scaling.items() if key != "rope_type"} | {"type": "llama3"}
    assert read(tmp_path, {**LLAMA_3_2, "rope_scaling": old}) == read(tmp_path, LLAMA_3_2)
    short = {key: value for key, value in scaling.items() if not key.startswith("original")}
    unsaid = read(tmp_path, {**LLAMA_3_2, "rope_scaling": short}).rope_scaling
    assert unsaid is not None and unsaid.original_context == LLAMA_3_2["max_position_embeddings"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "text_config must be an object with model_type"),
        ({"text_config": []}, "text_config must be an object"),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "given twice"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is not supported"),
        ({"surprise": 1}, "surprise = 1 beside text_config is not supported"),
    ],
)
def test_a_multimodal_config_is_read_as_strictly(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, {**GEMMA_3_MULTIMODAL, **changes})
