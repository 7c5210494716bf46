from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.reading import Adapter, adapt, fill, gradients
from glasshouse.model import Taps, load_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCAB, WIDTH, LAYERS = 61, 32, 3
TOKENS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(9))
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
HEADS: dict[str, Any] = {**COMMON, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**HEADS, "intermediate_size": 48, "max_position_embeddings": 32}
BOTH = ["attn_out", "mlp_out"]
# What transformers calls the family, its settings, and the branches that its module boundaries show.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}, BOTH),
    "opt": (
        "OPT",
        {**HEADS, "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": WIDTH},
        BOTH,
    ),
    "falcon-parallel": ("Falcon", {**HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}, BOTH),
    "falcon-serial": ("Falcon", {**HEADS, "parallel_attn": False, "alibi": True, "bias": True}, BOTH),
    "gptj": (
        "GPTJ",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 4,
            "rotary_dim": 4,
            "n_positions": 32,
        },
        BOTH,
    ),
    "phi": ("Phi", WIDE, BOTH),
    "granite": ("Granite", {**WIDE, "residual_multiplier": 0.3}, []),
    "mamba": ("Mamba", {**COMMON, "state_size": 4}, []),
}


def made(family: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A tiny model of ``transformers`` whose every parameter is random."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


@pytest.fixture(params=sorted(CASES), scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Adapter, list[str]]:
    family, settings, branches = CASES[request.param]
    return Adapter(made(family, settings)), branches


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_what_is_read_is_what_transformers_calls_hidden_states(case):
    adapter, branches = case
    before = hooks(adapter.model)  # transformers itself may leave some of its own
    with Taps(read=["*"]) as taps:
        logits = adapter(TOKENS, taps)
    assert hooks(adapter.model) == before
    expected = adapter.model(input_ids=TOKENS, output_hidden_states=True)
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    assert torch.allclose(adapter(TOKENS), expected.logits, atol=1e-5)
    states = list(expected.hidden_states)
    if (
        adapter.model.config.model_type == "mamba"
    ):  # transformers lists what leaves each block, not what enters
        states = [taps["embed"], *states[: LAYERS - 1], states[-1]]
    names = ["resid_pre", *branches, "resid_post"]
    listed = ["embed", *(f"blocks.{i}.{name}" for i in range(LAYERS) for name in names), "final_norm"]
    assert sorted(adapter.sites()) == sorted(listed)
    for i in range(LAYERS):
        assert torch.allclose(taps[f"blocks.{i}.resid_pre"], states[i], atol=1e-5)
        if i + 1 < LAYERS:
            assert torch.allclose(taps[f"blocks.{i}.resid_post"], states[i + 1], atol=1e-5)
        if branches:
            parts = [taps[f"blocks.{i}.{name}"] for name in ("resid_pre", "attn_out", "mlp_out")]
            assert torch.allclose(sum(parts), taps[f"blocks.{i}.resid_post"], atol=1e-4)
            assert parts[1].norm() > 0.1 and parts[2].norm() > 0.1
    assert torch.allclose(taps["embed"], states[0], atol=1e-5)
    assert torch.allclose(taps["final_norm"], states[-1], atol=1e-5), "what the head reads"


@torch.no_grad()
def test_edits_reach_the_rest_of_the_computation(case):
    adapter, branches = case
    plain = adapter(TOKENS)
    for site in adapter.sites():
        with Taps(edit={site: lambda x: x * torch.linspace(0.3, 1.5, x.shape[-1])}) as taps:
            assert not torch.allclose(adapter(TOKENS, taps), plain, atol=1e-3), site
        with Taps(edit={site: lambda x: x}) as taps:
            assert torch.equal(adapter(TOKENS, taps), plain), site
    shift = torch.linspace(-1, 1, WIDTH)
    for name in branches:
        with Taps(read=["blocks.1.*"], edit={f"blocks.1.{name}": lambda x: x + shift}) as taps:
            adapter(TOKENS, taps)
        block = {
            site: taps[f"blocks.1.{site}"] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        }
        parts = block["resid_pre"] + block["attn_out"] + block["mlp_out"]
        assert torch.allclose(parts, block["resid_post"], atol=1e-4), f"the edited {name} is what is added"


@torch.no_grad()
def test_patching_a_whole_layer_transplants_the_rest_of_the_computation(case):
    adapter, _ = case
    with Taps(read=["blocks.1.resid_post"]) as source:
        expected = adapter(TOKENS.flip(1), source)
    with Taps(edit={"blocks.1.hook_resid_post": lambda _: source["blocks.1.resid_post"]}) as taps:
        assert torch.allclose(adapter(TOKENS, taps), expected, atol=1e-5)


@torch.no_grad()
def test_stopping_early_runs_no_later_block_and_leaves_nothing_behind(case):
    adapter, branches = case
    before = hooks(adapter.model)
    plain, deepest = adapter(TOKENS), f"blocks.1.{(['resid_pre', *branches])[-1]}"
    with Taps(read=["*"]) as whole:
        adapter(TOKENS, whole)
    blocks = adapter._boundaries["blocks.2.resid_post"].module
    handle = blocks.register_forward_hook(lambda *_: pytest.fail("the next block ran"))
    with Taps(read=[deepest], stop_early=True) as taps:
        adapter(TOKENS, taps)
    handle.remove()
    assert torch.equal(taps[deepest], whole[deepest])
    assert hooks(adapter.model) == before
    assert torch.equal(adapter(TOKENS), plain)


def test_gradients_at_a_site_are_those_of_a_small_step(case):
    adapter, branches = case
    site = f"blocks.1.{(['resid_post', *branches])[-1]}"

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    before = [p.requires_grad for p in adapter.parameters()]
    found = gradients(adapter, TOKENS, metric, [site])
    assert [p.requires_grad for p in adapter.parameters()] == before
    step = 1e-2 * found.grads[site] / found.grads[site].norm()
    with torch.no_grad():
        up, down = (
            metric(adapter(TOKENS, Taps(edit={site: lambda x, s=sign: x + s * step})), TOKENS).sum()
            for sign in (1, -1)
        )
    assert torch.isclose(up - down, 2e-2 * found.grads[site].norm(), rtol=0.05)


@torch.no_grad()
def test_a_model_that_we_load_ourselves_shows_the_same_at_its_boundaries(tmp_path):
    theirs = made(
        "GPT2", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}
    )
    theirs.save_pretrained(tmp_path)
    adapter, ours = adapt(tmp_path), load_hf(tmp_path)
    assert adapter.config.context == 32 and adapter.config.d_model == WIDTH
    with Taps(read=adapter.sites()) as a, Taps(read=adapter.sites()) as b:
        assert torch.allclose(adapter(TOKENS, a), ours(TOKENS, b), atol=1e-4)
    for site in adapter.sites():
        assert torch.allclose(a[site], b[site], atol=1e-4), site


def test_an_activation_store_is_filled_from_an_adapted_model(tmp_path):
    adapter = Adapter(made(*CASES["opt"][:2]))
    store = fill(tmp_path / "s", adapter, TOKENS, ["blocks.*.resid_post"])
    with torch.no_grad():
        expected = adapter.model(input_ids=TOKENS, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(store.read("blocks.1.resid_post"), expected.flatten(0, 1), atol=1e-5)
    store.check_model(adapter)
    with pytest.raises(UsageError, match=r"no site 'blocks\.0\.q'.*model\.sites\(\) lists all"):
        fill(tmp_path / "t", adapter, TOKENS, ["blocks.0.q"])


def test_a_site_that_was_not_reached_raises():
    adapter = Adapter(made(*CASES["phi"][:2]))
    with pytest.raises(LookupError, match="never reached"), Taps(read=["blocks.0.mlp_out"]):
        adapter(TOKENS)  # the taps were forgotten
    adapter.model.model.layers[1].mlp = nn.Identity()  # the model changed behind the adapter's back
    with pytest.raises(LookupError, match=r"never reached in this pass: \['blocks.1.mlp_out'\]"):
        adapter(TOKENS, Taps(read=["blocks.*.mlp_out"]))
    assert hooks(adapter.model) == 0


def test_hooks_are_removed_when_a_pass_fails():
    adapter = Adapter(made(*CASES["phi"][:2]))
    plain = adapter(TOKENS)
    with pytest.raises(ZeroDivisionError):
        adapter(TOKENS, Taps(edit={"blocks.1.attn_out": lambda x: 1 / 0}))
    with pytest.raises(UsageError, match="made"):
        adapter(TOKENS, Taps(edit={"blocks.1.attn_out": lambda x: x[0]}))
    assert hooks(adapter.model) == 0 and torch.equal(adapter(TOKENS), plain)


def test_models_without_one_stream_of_blocks_are_refused():
    with pytest.raises(UsageError, match=r"config\.vocab_size is missing"):
        Adapter(nn.Linear(2, 2))
    shape = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape))
    with pytest.raises(UsageError, match="does not run on token ids alone"):
        Adapter(t5)
    assert hooks(t5) == 0
    opt = made(*CASES["opt"][:2])
    opt.model.decoder.layers = nn.ModuleList([opt.model.decoder.layers[0]] * 2)
    opt.config.num_hidden_layers = 2
    with pytest.raises(UsageError, match="each block once and in order; found none"):
        Adapter(opt)
    compiled = torch.compile(made(*CASES["phi"][:2]), backend="eager")
    with pytest.raises(UsageError, match="before compiling"):
        Adapter(compiled)


def test_a_prompt_longer_than_the_context_is_refused():
    adapter = Adapter(made(*CASES["phi"][:2]))
    with pytest.raises(UsageError, match="33 tokens exceed the model's context of 32"):
        adapter(torch.zeros(1, 33, dtype=torch.int64))


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        adapt(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'glasshouse-lm\[hf\]'"):
        adapt(tmp_path)
