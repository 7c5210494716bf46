"""GGUF files hold our weights under llama.cpp's names and layouts, or are refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import GPT
from glasshouse.model.config import RopeScaling
from glasshouse.model.gguf import architecture_for, paired, save_gguf, unpaired
from glasshouse.model.gpt import rotary_tables, rotate
from glasshouse.tokenizer import SPECIALS, Tokenizer
from model.shapes import FITTING

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'glasshouse-lm[gguf]'")

GEMMA: dict[str, Any] = {"tied": True, "attn_scale": None, "full_layers": (1,), "attn_softcap": 5.0}
# architecture -> shape of tests/model/conftest.py and the features that llama.cpp computes
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": FITTING["llama"],
    "llama-biased-linear": (
        "grouped",
        {
            **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True, "tied": True},
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        },
    ),
    "llama-mistral": ("grouped", {"d_head": 6, "window_tokens": 32}),  # as long as the context: no effect
    "qwen2": ("grouped", {"attn_bias": True}),
    "qwen3": FITTING["qwen3"],
    "gpt2": FITTING["gpt2"],
    "gptneox": ("gpt2", {"position": "rotary", "rope_fraction": 0.5, "parallel": True, "tied": True}),
    "gemma2": ("grouped", {**FITTING["gemma2"][1], **GEMMA}),
    "gemma3": (
        "grouped",
        {**FITTING["gemma3_text"][1], "attn_scale": None, "full_layers": (), "n_layer": 5},
    ),
    "olmo2": FITTING["olmo2"],
}
STEM = {"embed": "token_embd", "pos": "position_embd", "norm": "output_norm", "head": "output"}
BLOCK = {
    **{"norm1": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v"},
    **{"attn.o": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"},
    **{"norm2": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"},
    **{"post1": "post_attention_norm", "post2": "post_ffw_norm"},
}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, bf16 included, shaped as in memory."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        x = torch.from_numpy(t.data.copy())
        shape = [int(n) for n in reversed(t.shape)]
        if t.tensor_type == gguf.GGMLQuantizationType.BF16:
            x = x.view(torch.bfloat16)
        found[t.name] = x.reshape(shape)
    return found


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def expected(model: GPT, case: str) -> dict[str, torch.Tensor]:
    """What the file must hold, spelt out by hand."""
    config, wanted = model.config, {}
    state = {name: p.detach() for name, p in model.named_parameters()}
    for name, x in state.items():
        *parts, kind = name.split(".")
        if config.norm_offset and x.ndim == 1:
            x = x + 1
        if parts[0] != "blocks":
            wanted[f"{STEM[parts[0]]}.{kind}"] = x
            continue
        what, layer = ".".join(parts[2:]), parts[1]
        if case.startswith("llama") and what in ("attn.q", "attn.k"):
            heads = config.n_head if what == "attn.q" else config.kv_heads
            half = config.head_width // 2
            order = [
                h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)
            ]
            x = x[order]
        if case in ("gpt2", "gptneox") and what in ("attn.q", "attn.k", "attn.v"):
            fused = [state[f"blocks.{layer}.attn.{part}.{kind}"] for part in "qkv"]
            wanted[f"blk.{layer}.attn_qkv.{kind}"] = torch.cat(fused)
            continue
        wanted[f"blk.{layer}.{BLOCK[what]}.{kind}"] = x
    if case == "gptneox":
        wanted["output.weight"] = state["embed.weight"]
    return wanted


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_tensor_equals_ours(tiny, tmp_path, case):
    shape, features = CASES[case]
    model = tiny(shape, **features)
    path = tmp_path / "sub" / "m.gguf"
    architecture = save_gguf(model, path)
    assert architecture == case.split("-")[0] == fields_of(path)["general.architecture"]
    found, wanted = tensors_of(path), expected(model, case)
    divisors = found.pop("rope_freqs.weight", None)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], x), name
    if divisors is None:
        assert case != "llama"
        return
    scaled = model.rope[1, 1].asin()  # of position 1: the frequencies
    plain = model.config.rope_theta ** (-torch.arange(len(scaled)) / len(scaled))
    assert torch.allclose(plain / divisors, scaled, rtol=1e-5)


def test_hyperparameters_are_written_under_the_names_that_are_read(tiny, tmp_path):
    shape, features = CASES["gemma3"]
    save_gguf(tiny(shape, **features), tmp_path / "m.gguf", name="small")
    fields = fields_of(tmp_path / "m.gguf")
    wanted = {
        **{"context_length": 32, "embedding_length": 16, "block_count": 5, "feed_forward_length": 42},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 4},
        **{"attention.sliding_window": 4, "rope.dimension_count": 4, "rope.freq_base_swa": 50.0},
        **{"rope.freq_base": 10_000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    }
    assert {key: fields[f"gemma3.{key}"] for key in wanted} == wanted
    assert fields["general.name"] == "small" and fields["general.file_type"] == 0
    shape, features = CASES["gptneox"]
    save_gguf(tiny(shape, **features), tmp_path / "n.gguf")
    fields = fields_of(tmp_path / "n.gguf")
    assert fields["gptneox.use_parallel_residual"] is True and fields["gptneox.rope.dimension_count"] == 2


@pytest.mark.parametrize(("dtype", "file_type"), [(torch.bfloat16, 32), (torch.float16, 1)])
def test_half_precision_is_kept_for_matrices_and_widened_for_vectors(tiny, tmp_path, dtype, file_type):
    model = tiny("grouped", qk_norm=True).to(dtype)
    save_gguf(model, tmp_path / "m.gguf")
    found = tensors_of(tmp_path / "m.gguf")
    assert {x.dtype for x in found.values() if x.ndim == 2} == {dtype}
    assert {x.dtype for x in found.values() if x.ndim == 1} == {torch.float32}
    assert torch.equal(found["blk.1.ffn_up.weight"], model.blocks[1].mlp.up.weight)
    assert fields_of(tmp_path / "m.gguf")["general.file_type"] == file_type


@torch.no_grad()
def test_rotating_neighbours_of_permuted_rows_gives_the_same_scores(tiny):
    model = tiny("grouped")
    config, attn = model.config, model.blocks[0].attn
    x = torch.randn(7, config.d_model, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(config, 7)

    def by_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return rotate((x @ weight.T).view(7, heads, -1).transpose(0, 1), cos, sin)

    def by_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
        a, b = (x @ paired(weight, heads).T).view(7, heads, -1, 2).transpose(0, 1).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    scores = []
    for turn in (by_halves, by_neighbours):
        q, k = turn(attn.q.weight, 4), turn(attn.k.weight, 2).repeat_interleave(2, dim=0)
        scores.append(q @ k.transpose(-1, -2))
    assert torch.allclose(*scores, atol=1e-5)
    assert torch.equal(unpaired(paired(attn.q.weight, 4), 4), attn.q.weight)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grouped", {"window_tokens": 4}, r"llama \(mistral\): window_tokens is 4"),
    ("grouped", {"activation": "gelu"}, "activation is 'gelu' .needs silu"),
    ("ours", {}, "llama .llama.: mlp is 'plain'"),
    ("gpt2", {"activation": "relu"}, "activation is 'relu' .needs gelu_tanh"),
    ("grouped", {**FITTING["gemma2"][1], **GEMMA, "full_layers": ()}, r"needs \(1,\), every 2th"),
    ("grouped", {**FITTING["gemma2"][1], **GEMMA, "attn_softcap": None}, "attn_softcap is None"),
    ("grouped", {**FITTING["gemma2"][1], **GEMMA, "tied": False}, "tied is False .needs True"),
    ("grouped", {**FITTING["gemma2"][1], **GEMMA, "attn_scale": 0.1}, "attn_scale is 0.1 .needs 0.5"),
    ("grouped", {"qk_norm": True, "rope_scaling": FITTING["llama"][1]["rope_scaling"]}, "of kind 'llama3'"),
    ("grouped", {"value_residual": True}, "value_residual is True"),
]


@pytest.mark.parametrize(("shape", "features", "message"), REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_with_the_reason(tiny, tmp_path, shape, features, message):
    with pytest.raises(CheckpointError, match=message):
        save_gguf(tiny(shape, **features), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        save_gguf(tiny("grouped"), tmp_path / "m.gguf")


def test_without_the_package_the_extra_is_named(tiny, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"glasshouse-lm\[gguf\]"):
        save_gguf(tiny("grouped"), tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["the dragon's soup is hot, the soup is the dragon's"] * 3, 280)


def test_the_tokenizer_goes_along_with_its_ids_merges_and_roles(tiny, tmp_path, words):
    words.save(tmp_path / "tokenizer.json")
    size = words.vocab_size + 3  # a padded vocabulary
    save_gguf(tiny("grouped", vocab_size=size), tmp_path / "m.gguf", tmp_path)
    fields = {k.removeprefix("tokenizer.ggml."): v for k, v in fields_of(tmp_path / "m.gguf").items()}
    assert (fields["model"], fields["pre"]) == ("gpt2", "gpt-2")
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    by_id = {i: token for token, i in raw["model"]["vocab"].items()}
    assert fields["tokens"][: len(by_id)] == [by_id[i] for i in range(len(by_id))]
    assert fields["tokens"][len(by_id) : words.vocab_size] == list(SPECIALS)
    assert fields["merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert fields["token_type"] == [1] * len(by_id) + [3] * len(SPECIALS) + [5] * 3
    ids = (fields["bos_token_id"], fields["eos_token_id"], fields["padding_token_id"])
    assert ids == (words.bos, words.end, words.pad) and fields["add_bos_token"] is True


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path, words):
    words.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="ids up to 2[67][0-9], but the model's vocab_size is 53"):
        save_gguf(tiny("grouped"), tmp_path / "m.gguf", tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="no such tokenizer file"):
        save_gguf(tiny("grouped"), tmp_path / "m.gguf", tmp_path / "absent.json")


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, {"type": "ByteLevel"}]}}, "no name"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name"),
        ({"normalizer": {"type": "Lowercase"}}, "no name"),
        ({"model": {"type": "Unigram", "vocab": []}}, "only byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_apply_otherwise_is_refused(tiny, tmp_path, words, change, message):
    words.save(tmp_path / "tokenizer.json")
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(CheckpointError, match=message):
        save_gguf(tiny("grouped", vocab_size=300), tmp_path / "m.gguf", tmp_path)


def test_the_plainest_architecture_is_chosen(tiny):
    assert architecture_for(tiny("grouped").config).name == "LLAMA"
