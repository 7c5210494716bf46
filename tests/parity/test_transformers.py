"""Our forward pass, gradients and folders against transformers, on small random models in fp32."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.families import FAMILIES
from glasshouse.model.generate import generate
from glasshouse.model.hf import load_hf, save_hf
from parity.references import CASES, CONTEXT, TOKENS, quiet, randomised, reference, relative, reloaded, save

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'glasshouse-lm[hf]'")

# Small models in fp32: what remains is the order of sums. Gemma-3's embeddings are scaled and its heads
# normed, which makes its numbers larger by a factor of ten and the rounding with them.
CLOSE = 2e-5


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GPT, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save(reference(request.param), folder)
    return theirs, load_hf(folder), folder


def test_every_family_has_a_case():
    kinds = {kind for kind, _ in CASES.values()}
    transformers = quiet()
    types = {getattr(transformers, f"{kind}Config").model_type for kind in kinds}
    assert types == FAMILIES.keys()


@torch.no_grad()
def test_logits_equal(pair):
    theirs, ours, _ = pair
    assert relative(ours(TOKENS), theirs(TOKENS).logits) < CLOSE


@torch.no_grad()
def test_every_resid_post_equals(pair):
    theirs, ours, _ = pair
    with Taps(read=["blocks.*.resid_post", "blocks.0.resid_pre", "final_norm"]) as taps:
        ours(TOKENS, taps)
    after: list[torch.Tensor] = []  # their last hidden state is normed: the last block is read by a hook
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: after.append(out[0] if type(out) is tuple else out))
        for block in blocks(theirs)
    ]
    hidden = theirs(TOKENS, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert len(after) == ours.config.n_layer == len(hidden) - 1
    assert relative(taps["blocks.0.resid_pre"], hidden[0]) < CLOSE
    assert relative(taps["final_norm"], hidden[-1]) < CLOSE
    for i, block in enumerate(after):
        assert relative(taps[f"blocks.{i}.resid_post"], block) < CLOSE, i


def blocks(theirs: Any) -> Any:
    """Their layers."""
    for stack, layers in (("transformer", "h"), ("gpt_neox", "layers"), ("model", "layers")):
        if hasattr(theirs, stack):
            return getattr(getattr(theirs, stack), layers)
    raise AssertionError("no layers")


def test_gradients_equal(pair, tmp_path):
    theirs, ours, folder = pair
    for model in (theirs, ours):
        model.zero_grad()
    torch.nn.functional.cross_entropy(ours(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    logits = theirs(TOKENS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert relative(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad) < CLOSE
    # All others through the folder: their gradients, written in place of their weights, read as ours.
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    (tmp_path / "grads").mkdir()
    save(theirs, tmp_path / "grads")
    expected = {name: p.detach() for name, p in load_hf(tmp_path / "grads").named_parameters()}
    with torch.no_grad():
        theirs.load_state_dict(reloaded(folder).state_dict())
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in ours.named_parameters():
        assert p.grad is not None
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding.
        scale = max(float(expected[name].abs().max()), 1e-2 * largest)
        assert float((p.grad - expected[name]).abs().max()) < 2 * CLOSE * scale, name


def test_a_saved_folder_loads_unchanged_in_transformers(pair, tmp_path):
    _, ours, folder = pair
    family = save_hf(ours, tmp_path / "export")
    assert family == json.loads((folder / "config.json").read_text())["model_type"]
    again = reloaded(tmp_path / "export")
    with torch.no_grad():
        assert relative(again(TOKENS).logits, ours(TOKENS)) < CLOSE
    back = load_hf(tmp_path / "export")
    assert back.config == ours.config or back.config.mlp_width == ours.config.mlp_width
    for (name, a), (_, b) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


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


@pytest.mark.parametrize(
    ("family", "features"),
    [
        ("qwen3", {"qk_norm": True, "mlp": "gated", "activation": "relu2", "d_head": 6}),
        ("llama", {"mlp": "gated", "activation": "gelu_tanh", "rope_theta": 77.0, "tied": False}),
        ("llama", {"mlp": "gated", "activation": "silu", "attn_bias": True, "attn_out_bias": True}),
        ("mistral", {"mlp": "gated", "activation": "silu", "window_tokens": 4, "d_head": 6}),
        ("qwen2", {"mlp": "gated", "attn_bias": True, "window_tokens": 4, "full_layers": (1,)}),
        ("gpt_neox", {"norm": "layer", "mlp_bias": True, "rope_fraction": 0.5, "parallel": True}),
        (
            "gemma2",
            {
                **{"mlp": "gated", "norm_place": "both", "norm_offset": True, "embed_scale": 4.0},
                **{"logit_softcap": 2.0, "window_tokens": 4},
            },
        ),
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
    config = GPTConfig(vocab_size=71, context=CONTEXT, d_model=16, n_layer=2, n_head=4, **features)
    model = randomised(GPT(config).init_weights(0))
    assert save_hf(model, tmp_path / "export", bos_id=1, eos_id=5, pad_id=0) == family
    theirs = reloaded(tmp_path / "export")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 5, 0)
    with torch.no_grad():
        assert relative(theirs(TOKENS).logits, model(TOKENS)) < CLOSE


@torch.no_grad()
def test_the_text_part_of_a_multimodal_model_is_read(tmp_path):
    transformers = quiet()
    text = {
        **CASES["gemma3-usual-pattern"][1],
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    vision = {
        **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        **{"image_size": 8, "patch_size": 4},
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, attn_implementation="eager")
    theirs = randomised(transformers.Gemma3ForConditionalGeneration(config))
    save(theirs, tmp_path)
    ours = load_hf(tmp_path)
    assert relative(ours(TOKENS), theirs(TOKENS).logits) < CLOSE


def test_sharded_folders_are_read(tmp_path):
    model = save(reference("llama-untied"), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert relative(load_hf(tmp_path)(TOKENS), model(TOKENS).logits) < CLOSE


def test_bf16_weights_become_fp32_unless_asked(tmp_path):
    save(reference("qwen3").to(torch.bfloat16), tmp_path)
    ours = load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        assert relative(ours(TOKENS), reloaded(tmp_path, dtype=torch.float32)(TOKENS).logits) < CLOSE
    half = load_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(TOKENS).dtype == torch.bfloat16
