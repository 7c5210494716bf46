"""Tiny random models of transformers, one for every family and for every feature that could be missed.

Sizes are chosen so that features bite: 40 tokens against windows of 5 and 6 and an original context of 16,
caps and scalars far from where they do nothing, and every parameter random.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

VOCAB, CONTEXT = 71, 48
TOKENS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(7))

GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": CONTEXT}
LLAMA: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT},
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GEMMA: dict[str, Any] = {
    **{**LLAMA, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5},
    "final_logit_softcapping": 3.0,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# name -> (what transformers calls the family, its settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-relu": (
        "GPT2",
        {
            **{**GPT2, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 50},
            **{"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
        },
    ),
    "llama-untied": ("Llama", {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama-tied-biased": (
        "Llama",
        {
            **{**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "llama-scaled-as-llama3": ("Llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama-scaled-linearly": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 6,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 90.0, "factor": 4.0},
        },
    ),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-late-windows": (
        "Qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-untied-gelu": ("Qwen3", {**LLAMA, "head_dim": 8, "hidden_act": "gelu", "attention_bias": True}),
    "qwen3-mixed-windows": (
        "Qwen3",
        {**LLAMA, "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED},
    ),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 6, "rope_theta": 77.0}),
    "mistral-wide-heads": ("Mistral", {**LLAMA, "sliding_window": 2, "head_dim": 10}),
    "neox": ("GPTNeoX", {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 300}),
    "neox-serial-unbiased": (
        "GPTNeoX",
        {
            **{**NEOX, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
            **{"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        },
    ),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma2-uncapped-full": (
        "Gemma2",
        {
            **{**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
            **{"layer_types": ["full_attention"] * 3, "attention_bias": True, "tie_word_embeddings": False},
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **{**GEMMA, "layer_types": MIXED},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3-usual-pattern": (
        "Gemma3Text",
        {**GEMMA, "num_hidden_layers": 7, "final_logit_softcapping": None},
    ),
    "olmo2": ("Olmo2", LLAMA),
    "olmo2-ungrouped": ("Olmo2", {**LLAMA, "num_key_value_heads": 4, "attention_bias": True}),
}
ARCHITECTURES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, over the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def randomised(model: Any) -> Any:
    """The model with every parameter random: fresh biases and norms would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def quiet() -> Any:
    """transformers, without its remarks on standard error."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def reference(name: str) -> Any:
    """The transformers model of a case. Attention in plain steps: their fused path leaves out softcaps."""
    transformers = quiet()
    kind, settings = CASES[name]
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**no_ids, **settings, attn_implementation="eager")
    return randomised(getattr(transformers, ARCHITECTURES.get(kind, f"{kind}ForCausalLM"))(config))


def save(model: Any, folder: Path, **how: Any) -> Any:
    """Save as transformers does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own files
        model.save_pretrained(folder, **how)
    return model


def reloaded(folder: Path, **how: Any) -> Any:
    """What transformers makes of a folder; every tensor must have found its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = quiet().AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", **how
        )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()
