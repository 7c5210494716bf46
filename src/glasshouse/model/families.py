"""The Hugging Face families we read and write, as literal tables: see ``family.py`` for what they mean.

Keys, defaults and tensor names are those of the configuration and modelling files of transformers 4.56
to 5.23; the parity tests hold every table against the installed version.
"""

from __future__ import annotations

from typing import Any

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.config import GPTConfig
from glasshouse.model.family import Family, Place, Rotary, Window, obstacles

_LLAMA_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("d_model", None),
    "num_hidden_layers": ("n_layer", None),
    "num_attention_heads": ("n_head", None),
    "num_key_value_heads": ("n_kv_head", None),
    "head_dim": ("d_head", None),
    "intermediate_size": ("d_mlp", None),
    "max_position_embeddings": ("context", None),
    "hidden_act": ("activation", "silu"),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
}
_ATTENTION_BIAS: dict[str, tuple[str, Any]] = {"attention_bias": ("attn_bias", False)}
_REQUIRED = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "max_position_embeddings",
    }
)
_LLAMA_NEEDS = {"norm": "rms", "position": "rotary", "mlp": "gated"}
_O_FOLLOWS = {"attn_out_bias": "attn_bias"}  # their one key sets the biases of q, k, v and o
_STEM = {
    "embed.weight": Place("model.embed_tokens.weight"),
    "norm.weight": Place("model.norm.weight"),
    "head.weight": Place("lm_head.weight"),
}
_ATTENTION = {
    f"blocks.{{i}}.attn.{x}.{kind}": Place(f"model.layers.{{i}}.self_attn.{x}_proj.{kind}")
    for kind in ("weight", "bias")
    for x in ("q", "k", "v", "o")
}
_GATED = {
    f"blocks.{{i}}.mlp.{x}.weight": Place(f"model.layers.{{i}}.mlp.{x}_proj.weight")
    for x in ("gate", "up", "down")
}
_PRE_NORMS = {
    "blocks.{i}.norm1.weight": Place("model.layers.{i}.input_layernorm.weight"),
    "blocks.{i}.norm2.weight": Place("model.layers.{i}.post_attention_layernorm.weight"),
}
_QK_NORMS = {
    f"blocks.{{i}}.attn.{x}_norm.weight": Place(f"model.layers.{{i}}.self_attn.{x}_norm.weight")
    for x in ("q", "k")
}
# Gemma-2 calls the norm on attention's output what Llama calls the norm before the MLP.
_SANDWICH_NORMS = {
    "blocks.{i}.norm1.weight": Place("model.layers.{i}.input_layernorm.weight"),
    "blocks.{i}.post1.weight": Place("model.layers.{i}.post_attention_layernorm.weight"),
    "blocks.{i}.norm2.weight": Place("model.layers.{i}.pre_feedforward_layernorm.weight"),
    "blocks.{i}.post2.weight": Place("model.layers.{i}.post_feedforward_layernorm.weight"),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={**_LLAMA_KEYS, **_ATTENTION_BIAS, "mlp_bias": ("mlp_bias", False)},
    required=_REQUIRED,
    needs=_LLAMA_NEEDS,
    follows=_O_FOLLOWS,
    fixed={"rope_interleaved": (False,)},
    rotary=Rotary(),
    d_model_by_head=True,
    tensors={
        **{**_STEM, **_PRE_NORMS, **_ATTENTION, **_GATED},
        "blocks.{i}.mlp.gate.bias": Place("model.layers.{i}.mlp.gate_proj.bias"),
        "blocks.{i}.mlp.up.bias": Place("model.layers.{i}.mlp.up_proj.bias"),
        "blocks.{i}.mlp.down.bias": Place("model.layers.{i}.mlp.down_proj.bias"),
    },
    skipped=("rotary_emb.inv_freq",),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={**_LLAMA_KEYS, "num_key_value_heads": ("n_kv_head", 8)},
    required=_REQUIRED,
    needs=_LLAMA_NEEDS,
    rotary=Rotary(),
    window=Window("all"),
    tensors={**_STEM, **_PRE_NORMS, **_ATTENTION, **_GATED},
    skipped=("rotary_emb.inv_freq",),
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={**_LLAMA_KEYS, "num_key_value_heads": ("n_kv_head", 32)},
    required=_REQUIRED,
    needs={**_LLAMA_NEEDS, "attn_bias": True},
    rotary=Rotary(),
    window=Window("late"),
    tensors={**_STEM, **_PRE_NORMS, **_ATTENTION, **_GATED},
    skipped=("rotary_emb.inv_freq",),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={
        **{**_LLAMA_KEYS, **_ATTENTION_BIAS},
        **{"head_dim": ("d_head", 128), "num_key_value_heads": ("n_kv_head", 32)},
    },
    required=_REQUIRED,
    needs={**_LLAMA_NEEDS, "qk_norm": True},
    follows=_O_FOLLOWS,
    rotary=Rotary(),
    window=Window("late"),
    tensors={**_STEM, **_PRE_NORMS, **_ATTENTION, **_GATED, **_QK_NORMS},
)
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys={**_LLAMA_KEYS, **_ATTENTION_BIAS, "rms_norm_eps": ("norm_eps", 1e-5)},
    required=_REQUIRED,
    needs={**_LLAMA_NEEDS, "norm_place": "post", "qk_norm": True, "qk_norm_span": "all"},
    follows=_O_FOLLOWS,
    rotary=Rotary(),
    tensors={
        **{**_STEM, **_ATTENTION, **_GATED, **_QK_NORMS},
        "blocks.{i}.post1.weight": Place("model.layers.{i}.post_attention_layernorm.weight"),
        "blocks.{i}.post2.weight": Place("model.layers.{i}.post_feedforward_layernorm.weight"),
    },
)
_GEMMA_NEEDS = {**_LLAMA_NEEDS, "norm_offset": True, "norm_place": "both"}
_GEMMA_KEYS: dict[str, tuple[str, Any]] = {
    **{key: value for key, value in _LLAMA_KEYS.items() if key != "hidden_act"},
    **_ATTENTION_BIAS,
    "hidden_activation": ("activation", "gelu_pytorch_tanh"),
    "head_dim": ("d_head", 256),
    "num_key_value_heads": ("n_kv_head", 4),
    "tie_word_embeddings": ("tied", True),
    "final_logit_softcapping": ("logit_softcap", None),
}
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys={
        **_GEMMA_KEYS,
        "final_logit_softcapping": ("logit_softcap", 30.0),
        "attn_logit_softcapping": ("attn_softcap", 50.0),
    },
    required=_REQUIRED,
    needs=_GEMMA_NEEDS,
    follows=_O_FOLLOWS,
    fixed={"use_bidirectional_attention": (False,)},
    inert=frozenset({"hidden_act"}),  # released files carry it beside the key that counts
    rotary=Rotary(),
    window=Window("periodic", period=2),
    scale_key="query_pre_attn_scalar",
    embed_root=True,
    d_model_by_head=True,
    tensors={**_STEM, **_SANDWICH_NORMS, **_ATTENTION, **_GATED},
)
# The released multimodal files leave out what equals transformers' defaults, so nothing but shapes that
# have none is required.
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys={
        **_GEMMA_KEYS,
        "vocab_size": ("vocab_size", 262_208),
        "num_attention_heads": ("n_head", 8),
        "max_position_embeddings": ("context", 131_072),
    },
    required=frozenset({"hidden_size", "intermediate_size", "num_hidden_layers"}),
    needs={**_GEMMA_NEEDS, "qk_norm": True},
    follows=_O_FOLLOWS,
    # transformers reads attn_logit_softcapping here and does not compute it
    fixed={"use_bidirectional_attention": (False,), "attn_logit_softcapping": (None,)},
    rotary=Rotary(theta_default=1_000_000.0, window="rope_local_base_freq"),
    window=Window("periodic", period=6, period_key="sliding_window_pattern"),
    scale_key="query_pre_attn_scalar",
    embed_root=True,
    d_model_by_head=True,
    tensors={**_STEM, **_SANDWICH_NORMS, **_ATTENTION, **_GATED, **_QK_NORMS},
    aliases={  # the text part of a multimodal file, before and since transformers 4.52
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    elsewhere=(
        *("vision_tower.", "model.vision_tower."),
        *("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)
GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    keys={
        "vocab_size": ("vocab_size", 50432),
        "hidden_size": ("d_model", 6144),
        "num_hidden_layers": ("n_layer", 44),
        "num_attention_heads": ("n_head", 64),
        "intermediate_size": ("d_mlp", 24576),
        "max_position_embeddings": ("context", 2048),
        "hidden_act": ("activation", "gelu"),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "use_parallel_residual": ("parallel", True),
        "attention_bias": ("attn_bias", True),
        "tie_word_embeddings": ("tied", False),
    },
    required=frozenset(),
    needs={"norm": "layer", "position": "rotary", "mlp": "plain", "mlp_bias": True},
    follows=_O_FOLLOWS,
    rotary=Rotary(
        theta=("rotary_emb_base", "rope_theta"),
        fraction=("rotary_pct", "partial_rotary_factor"),
        fraction_default=0.25,
        partial=True,
    ),
    d_model_by_head=True,
    tensors={
        "embed.weight": Place("gpt_neox.embed_in.weight"),
        "norm.weight": Place("gpt_neox.final_layer_norm.weight"),
        "norm.bias": Place("gpt_neox.final_layer_norm.bias"),
        "head.weight": Place("embed_out.weight"),
        **{
            f"blocks.{{i}}.{ours}.{kind}": Place(f"gpt_neox.layers.{{i}}.{theirs}.{kind}")
            for kind in ("weight", "bias")
            for ours, theirs in (
                *(("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")),
                *(("attn.o", "attention.dense"), ("mlp.up", "mlp.dense_h_to_4h")),
                ("mlp.down", "mlp.dense_4h_to_h"),
            )
        },
        **{
            f"blocks.{{i}}.attn.{x}.{kind}": Place(
                f"gpt_neox.layers.{{i}}.attention.query_key_value.{kind}", part=part, fused="heads"
            )
            for kind in ("weight", "bias")
            for part, x in enumerate(("q", "k", "v"))
        },
    },
    aliases={"lm_head.": "embed_out."},
    skipped=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": ("vocab_size", 50257),
        "n_embd": ("d_model", 768),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_inner": ("d_mlp", None),
        "n_positions": ("context", 1024),
        "activation_function": ("activation", "gelu_new"),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tied", True),
    },
    required=frozenset(),
    needs={
        **{"norm": "layer", "position": "learned", "mlp": "plain"},
        **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
    },
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    tensors={
        "embed.weight": Place("transformer.wte.weight"),
        "pos.weight": Place("transformer.wpe.weight"),
        "norm.weight": Place("transformer.ln_f.weight"),
        "norm.bias": Place("transformer.ln_f.bias"),
        "head.weight": Place("lm_head.weight"),
        "blocks.{i}.norm1.weight": Place("transformer.h.{i}.ln_1.weight"),
        "blocks.{i}.norm1.bias": Place("transformer.h.{i}.ln_1.bias"),
        "blocks.{i}.norm2.weight": Place("transformer.h.{i}.ln_2.weight"),
        "blocks.{i}.norm2.bias": Place("transformer.h.{i}.ln_2.bias"),
        **{
            f"blocks.{{i}}.attn.{x}.{kind}": Place(
                f"transformer.h.{{i}}.attn.c_attn.{kind}", part=part, transposed=kind == "weight"
            )
            for kind in ("weight", "bias")
            for part, x in enumerate(("q", "k", "v"))
        },
        "blocks.{i}.attn.o.weight": Place("transformer.h.{i}.attn.c_proj.weight", transposed=True),
        "blocks.{i}.attn.o.bias": Place("transformer.h.{i}.attn.c_proj.bias"),
        "blocks.{i}.mlp.up.weight": Place("transformer.h.{i}.mlp.c_fc.weight", transposed=True),
        "blocks.{i}.mlp.up.bias": Place("transformer.h.{i}.mlp.c_fc.bias"),
        "blocks.{i}.mlp.down.weight": Place("transformer.h.{i}.mlp.c_proj.weight", transposed=True),
        "blocks.{i}.mlp.down.bias": Place("transformer.h.{i}.mlp.c_proj.bias"),
    },
    aliases={f"{x}.": f"transformer.{x}." for x in ("wte", "wpe", "h", "ln_f")},  # saved without the head
    skipped=(".attn.bias", ".attn.masked_bias"),  # the causal mask, once stored as a buffer
)
# The order in which an export tries them: the plainest first.
FAMILIES = {
    family.model_type: family
    for family in (LLAMA, QWEN3, GPT2, QWEN2, MISTRAL, GPT_NEOX, GEMMA2, GEMMA3, OLMO2)
}


def family_for(config: GPTConfig, name: str = "auto") -> Family:
    """The family that computes exactly this model; CheckpointError says what stands in the way."""
    if name != "auto" and name not in FAMILIES:
        raise UsageError(f"no family {name!r}; choose auto or one of {', '.join(FAMILIES)}")
    candidates = FAMILIES if name == "auto" else {name: FAMILIES[name]}
    for family in candidates.values():
        if not obstacles(config, family):
            return family
    reasons = "; ".join(f"{n}: {', '.join(obstacles(config, f))}" for n, f in candidates.items())
    raise CheckpointError(f"no Hugging Face family computes this model without changing it. {reasons}")
