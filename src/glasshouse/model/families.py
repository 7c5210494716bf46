"""The Hugging Face families we read and write: GPT-2, Llama, Qwen3, each as literal tables.

One table says which features of ``GPTConfig`` a family's config keys stand for, the other where its
tensors stand for ours. Loading and saving read the same tables, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.gpt import GPTConfig

# transformers' ACT2FN names -> ours; the first name of each is the one we write
ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}
# Keys that do not change the forward pass in evaluation: dropout, initialisation, bookkeeping, generation.
INERT = frozenset(
    {
        *("architectures", "auto_map", "dtype", "is_llama_config", "model_type", "n_ctx", "name_or_path"),
        *("tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version"),
        *("initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states", "output_past"),
        *("pretraining_tp", "reorder_and_upcast_attn", "return_dict", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "do_sample"),
        *("max_length", "min_length", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p"),
    }
)


@dataclass(frozen=True)
class Place:
    """Where one of our parameters stands in a family's file.

    ``third``: which third of a fused [q; k; v]. ``transposed``: stored [in, out] (GPT-2's Conv1D).
    """

    name: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """``keys``: their config key -> (our feature, their default; None: derived or required).

    ``needs``: features that the family has by construction. ``fixed``: keys of which only these values
    are computed here. ``tensors``: our parameter -> its place, with {i} for the layer.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, tuple[str, Any]]
    required: frozenset[str]
    needs: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, Place]
    skipped: tuple[str, ...] = ()  # buffers that old files carry: endings of their names


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
    "attention_bias": ("attn_bias", False),
    "tie_word_embeddings": ("tied", False),
}
_LLAMA_REQUIRED = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "max_position_embeddings",
    }
)
_LLAMA_TENSORS = {
    "embed.weight": Place("model.embed_tokens.weight"),
    "norm.weight": Place("model.norm.weight"),
    "head.weight": Place("lm_head.weight"),
    "blocks.{i}.norm1.weight": Place("model.layers.{i}.input_layernorm.weight"),
    "blocks.{i}.norm2.weight": Place("model.layers.{i}.post_attention_layernorm.weight"),
    "blocks.{i}.attn.q.weight": Place("model.layers.{i}.self_attn.q_proj.weight"),
    "blocks.{i}.attn.k.weight": Place("model.layers.{i}.self_attn.k_proj.weight"),
    "blocks.{i}.attn.v.weight": Place("model.layers.{i}.self_attn.v_proj.weight"),
    "blocks.{i}.attn.o.weight": Place("model.layers.{i}.self_attn.o_proj.weight"),
    "blocks.{i}.attn.q.bias": Place("model.layers.{i}.self_attn.q_proj.bias"),
    "blocks.{i}.attn.k.bias": Place("model.layers.{i}.self_attn.k_proj.bias"),
    "blocks.{i}.attn.v.bias": Place("model.layers.{i}.self_attn.v_proj.bias"),
    "blocks.{i}.attn.o.bias": Place("model.layers.{i}.self_attn.o_proj.bias"),
    "blocks.{i}.mlp.gate.weight": Place("model.layers.{i}.mlp.gate_proj.weight"),
    "blocks.{i}.mlp.up.weight": Place("model.layers.{i}.mlp.up_proj.weight"),
    "blocks.{i}.mlp.down.weight": Place("model.layers.{i}.mlp.down_proj.weight"),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={**_LLAMA_KEYS, "mlp_bias": ("mlp_bias", False)},
    required=_LLAMA_REQUIRED,
    needs={"norm": "rms", "position": "rotary", "mlp": "gated", "qk_norm": False},
    fixed={"rope_interleaved": (False,)},
    tensors={
        **_LLAMA_TENSORS,
        "blocks.{i}.mlp.gate.bias": Place("model.layers.{i}.mlp.gate_proj.bias"),
        "blocks.{i}.mlp.up.bias": Place("model.layers.{i}.mlp.up_proj.bias"),
        "blocks.{i}.mlp.down.bias": Place("model.layers.{i}.mlp.down_proj.bias"),
    },
    skipped=("rotary_emb.inv_freq",),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={**_LLAMA_KEYS, "head_dim": ("d_head", 128), "num_key_value_heads": ("n_kv_head", 32)},
    required=_LLAMA_REQUIRED,
    needs={"norm": "rms", "position": "rotary", "mlp": "gated", "qk_norm": True, "mlp_bias": False},
    fixed={"use_sliding_window": (False,)},
    tensors={
        **_LLAMA_TENSORS,
        "blocks.{i}.attn.q_norm.weight": Place("model.layers.{i}.self_attn.q_norm.weight"),
        "blocks.{i}.attn.k_norm.weight": Place("model.layers.{i}.self_attn.k_norm.weight"),
    },
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
        **{"norm": "layer", "position": "learned", "mlp": "plain", "qk_norm": False},
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
        "blocks.{i}.attn.q.weight": Place("transformer.h.{i}.attn.c_attn.weight", third=0, transposed=True),
        "blocks.{i}.attn.k.weight": Place("transformer.h.{i}.attn.c_attn.weight", third=1, transposed=True),
        "blocks.{i}.attn.v.weight": Place("transformer.h.{i}.attn.c_attn.weight", third=2, transposed=True),
        "blocks.{i}.attn.q.bias": Place("transformer.h.{i}.attn.c_attn.bias", third=0),
        "blocks.{i}.attn.k.bias": Place("transformer.h.{i}.attn.c_attn.bias", third=1),
        "blocks.{i}.attn.v.bias": Place("transformer.h.{i}.attn.c_attn.bias", third=2),
        "blocks.{i}.attn.o.weight": Place("transformer.h.{i}.attn.c_proj.weight", transposed=True),
        "blocks.{i}.attn.o.bias": Place("transformer.h.{i}.attn.c_proj.bias"),
        "blocks.{i}.mlp.up.weight": Place("transformer.h.{i}.mlp.c_fc.weight", transposed=True),
        "blocks.{i}.mlp.up.bias": Place("transformer.h.{i}.mlp.c_fc.bias"),
        "blocks.{i}.mlp.down.weight": Place("transformer.h.{i}.mlp.c_proj.weight", transposed=True),
        "blocks.{i}.mlp.down.bias": Place("transformer.h.{i}.mlp.c_proj.bias"),
    },
    skipped=(".attn.bias", ".attn.masked_bias"),  # the causal mask, once stored as a buffer
)
FAMILIES = {family.model_type: family for family in (LLAMA, QWEN3, GPT2)}


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


def obstacles(config: GPTConfig, family: Family) -> list[str]:
    """Why this family cannot compute this model: empty when it can."""
    found = [
        f"{feature} is {getattr(config, feature)!r} (needs {value!r})"
        for feature, value in family.needs.items()
        if getattr(config, feature) != value
    ]
    if config.attn_bias != config.attn_out_bias and "attn_out_bias" not in family.needs:
        found.append(f"attn_bias is {config.attn_bias} but attn_out_bias is {config.attn_out_bias}")
    width = config.head_width * config.n_head
    if family is LLAMA and config.d_model % config.n_head:  # transformers refuses to build it
        found.append(f"d_model {config.d_model} is not a multiple of n_head {config.n_head}")
    if family is GPT2 and config.kv_heads != config.n_head:
        found.append(f"n_kv_head is {config.kv_heads} (needs n_head, {config.n_head})")
    if family is GPT2 and width != config.d_model:
        found.append(f"n_head * d_head is {width} (needs d_model, {config.d_model})")
    return found
