"""Our forward pass, gradients and folders against transformers, on small random models in fp32."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.generate import generate
from glasshouse.model.hf import load_hf, save_hf

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'glasshouse-lm[hf]'")

LLAMA: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 71, "max_position_embeddings": 48},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 71, "n_positions": 48}),
    "gpt2-untied-relu": (
        "GPT2",
        {
            **{"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 50, "vocab_size": 71, "n_positions": 48},
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
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-untied-gelu": ("Qwen3", {**LLAMA, "head_dim": 8, "hidden_act": "gelu", "attention_bias": True}),
}
TOKENS = torch.randint(0, 71, (3, 21), generator=torch.Generator().manual_seed(7))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def reference(name: str) -> Any:
    """A transformers model whose every parameter is random: fresh biases and norms would hide mistakes."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, settings = CASES[name]
    quiet = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**quiet, **settings)
    architecture = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def saved(name: str, folder: Path) -> Any:
    model = reference(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own files
        model.save_pretrained(folder)
    return model


def reloaded(folder: Path, **how: Any) -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **how
        )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GPT, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = saved(request.param, folder)
    return theirs, load_hf(folder), folder


def test_logits_equal(pair):
    theirs, ours, _ = pair
    with torch.no_grad():
        assert relative(ours(TOKENS), theirs(TOKENS).logits) < 1e-5


def test_every_resid_post_equals(pair):
    theirs, ours, _ = pair
    with torch.no_grad(), Taps(read=["blocks.*.resid_post", "blocks.0.resid_pre", "final_norm"]) as taps:
        ours(TOKENS, taps)
        hidden = theirs(TOKENS, output_hidden_states=True).hidden_states
    layers = ours.config.n_layer
    assert len(hidden) == layers + 1
    assert relative(taps["blocks.0.resid_pre"], hidden[0]) < 1e-5
    for i in range(layers - 1):
        assert relative(taps[f"blocks.{i}.resid_post"], hidden[i + 1]) < 1e-5
    # Their last hidden state stands after the final norm; before it there is the last block's output.
    assert relative(taps["final_norm"], hidden[-1]) < 1e-5
    last = []
    stack = theirs.transformer.h if hasattr(theirs, "transformer") else theirs.model.layers
    hook = stack[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if type(out) is tuple else out)
    )
    with torch.no_grad():
        theirs(TOKENS)
    hook.remove()
    assert relative(taps[f"blocks.{layers - 1}.resid_post"], last[0]) < 1e-5


def test_gradients_equal(pair):
    theirs, ours, _ = pair
    for model in (theirs, ours):
        model.zero_grad()
    torch.nn.functional.cross_entropy(ours(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    logits = theirs(TOKENS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    expected = theirs.get_input_embeddings().weight.grad
    assert relative(ours.embed.weight.grad, expected) < 1e-5
    if hasattr(theirs, "transformer"):
        block = theirs.transformer.h[1]
        fused = block.attn.c_attn.weight.grad.T.chunk(3)
        theirs_qkv, theirs_down = fused, block.mlp.c_proj.weight.grad.T
    else:
        block = theirs.model.layers[1]
        attention = block.self_attn
        theirs_qkv = [p.weight.grad for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        theirs_down = block.mlp.down_proj.weight.grad
    attn = ours.blocks[1].attn
    for mine, other in zip((attn.q, attn.k, attn.v), theirs_qkv, strict=True):
        assert relative(mine.weight.grad, other) < 1e-5
    assert relative(ours.blocks[1].mlp.down.weight.grad, theirs_down) < 1e-5


def test_a_saved_folder_loads_unchanged_in_transformers(pair, tmp_path):
    _, ours, folder = pair
    family = save_hf(ours, tmp_path / "export")
    assert family == json.loads((folder / "config.json").read_text())["model_type"]
    again = reloaded(tmp_path / "export")
    with torch.no_grad():
        assert relative(again(TOKENS).logits, ours(TOKENS)) < 1e-5
    back = load_hf(tmp_path / "export")
    assert back.config.digest() == ours.config.digest() or back.config.mlp_width == ours.config.mlp_width
    for (name, a), (_, b) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("family", "features"),
    [
        ("qwen3", {"qk_norm": True, "mlp": "gated", "activation": "relu2", "d_head": 6}),
        ("llama", {"mlp": "gated", "activation": "gelu_tanh", "rope_theta": 77.0, "tied": False}),
        ("llama", {"mlp": "gated", "activation": "silu", "attn_bias": True, "attn_out_bias": True}),
        (
            "gpt2",
            {
                **{"norm": "layer", "position": "learned", "activation": "relu2", "d_mlp": 31},
                **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
            },
        ),
    ],
)
def test_a_model_of_ours_is_exported_to_the_family_that_computes_it(family, features, tmp_path):
    config = GPTConfig(vocab_size=71, context=32, d_model=16, n_layer=2, n_head=4, **features)
    model = GPT(config).init_weights(0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    assert save_hf(model, tmp_path / "export", bos_id=1, eos_id=5, pad_id=0) == family
    theirs = reloaded(tmp_path / "export")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 5, 0)
    with torch.no_grad():
        assert relative(theirs(TOKENS).logits, model(TOKENS)) < 1e-5


def test_cached_generation_writes_what_transformers_writes(pair):
    theirs, ours, _ = pair
    prompt = TOKENS[:1, :9]
    everything = torch.ones_like(prompt)  # else they take token 0, their padding, for padding
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = theirs.generate(
            prompt, attention_mask=everything, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert generate(ours, [prompt[0].tolist()], 12)[0].ids == ids[0, 9:].tolist()


def test_sharded_folders_are_read(tmp_path):
    model = reference("llama-untied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert relative(load_hf(tmp_path)(TOKENS), model(TOKENS).logits) < 1e-5


def test_bf16_weights_become_fp32_unless_asked(tmp_path):
    model = reference("qwen3").to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        assert relative(ours(TOKENS), reloaded(tmp_path, dtype=torch.float32)(TOKENS).logits) < 1e-5
    half = load_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(TOKENS).dtype == torch.bfloat16
