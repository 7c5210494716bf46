"""TransformerLens's side: every activation of tiny random models, under its own names.

    python tests/parity/peers/hooks_side.py tests/model/fixtures/transformer_lens

in an environment of its own with transformer-lens 3 (the last with ``HookedTransformer``) and transformers.
Each folder gets a random model as transformers saves it, and all that a pass through ``HookedTransformer``
without weight processing makes. Nothing of Glasshouse is imported.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions as convert

VOCAB, CONTEXT, LAYERS = 23, 8, 2
LLAMA: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT},
}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
ROTARY: dict[str, Any] = {
    **{"positional_embedding_type": "rotary", "rotary_base": 10000, "rotary_adjacent_pairs": False},
    **{"d_mlp": 20, "final_rms": True},
}
GROUPED: dict[str, Any] = {
    **{**ROTARY, "n_key_value_heads": 2, "gated_mlp": True, "normalization_type": "RMS", "act_fn": "silu"},
}
# name -> transformers' family, its settings; TransformerLens's own settings, its conversion of weights
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT},
        {"d_mlp": 64, "act_fn": "gelu_new", "normalization_type": "LN"},
        "convert_gpt2_weights",
    ),
    "llama": (
        "Llama",
        {**LLAMA, "rms_norm_eps": 1e-5},
        {**GROUPED, "rotary_dim": 4},
        "convert_llama_weights",
    ),
    "qwen3": (
        "Qwen3",
        {**LLAMA, "head_dim": 6, "rms_norm_eps": 1e-5},
        {**GROUPED, "rotary_dim": 6, "d_head": 6, "use_qk_norm": True},
        "convert_qwen3_weights",
    ),
    "neox": (
        "GPTNeoX",
        {**NEOX, "rotary_pct": 0.5, "hidden_act": "gelu"},
        {
            **{**ROTARY, "final_rms": False, "rotary_dim": 2, "parallel_attn_mlp": True, "act_fn": "gelu"},
            **{"normalization_type": "LN"},
        },
        "convert_neox_weights",
    ),
}


def main(folder: Path) -> None:
    tokens = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    for name, (family, settings, theirs, conversion) in CASES.items():
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{family}Config")(**settings)
        )
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn(p.shape) * 0.2)
        hf.eval().save_pretrained(folder / name)
        common = {
            "d_model": 16,
            "n_layers": LAYERS,
            "n_heads": 4,
            "d_head": 4,
            "n_ctx": CONTEXT,
            "d_vocab": VOCAB,
        }
        more = {"eps": 1e-5, "dtype": torch.float32, "device": "cpu"}
        config = HookedTransformerConfig.from_dict({**common, **more, **theirs})
        model = HookedTransformer(config)
        state = getattr(convert, conversion)(hf, config)
        model.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        model.set_use_attn_result(True)
        model.eval()
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens)
            difference = (logits - hf(tokens).logits).abs().max()
        if difference > 1e-4:
            raise SystemExit(f"{name}: the two differ by {difference:.2g}; nothing written")
        acts = {key: value.contiguous().clone() for key, value in cache.items()}
        save_file({"tokens": tokens, **acts}, folder / name / "activations.safetensors")
    versions = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
    text = json.dumps({**versions, "licence": "transformer-lens: MIT"}, indent=2)
    (folder / "versions.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
