from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.model import Taps, compiled
from glasshouse.model.compiled import compile_blocks, is_compiled, plain_blocks
from glasshouse.model.gpt import GPT, Block
from model.shapes import noisy

TOKENS = torch.arange(20).view(2, 10) % 13
FEATURES = {
    "modern": {"qk_norm": True, "value_residual": True, "logit_softcap": 15.0},
    "window": {"window_tokens": 4, "full_layers": (1,), "attn_softcap": 20.0, "norm_place": "both"},
    "parallel": {"parallel": True, "norm": "layer", "rope_fraction": 0.5, "activation": "gelu"},
}


def model(**features: object) -> GPT:
    return noisy(vocab_size=13, context=16, d_model=16, n_layer=3, n_head=2, **features)


def loss_and_gradients(m: GPT) -> tuple[torch.Tensor, ...]:
    loss = m(TOKENS).logsumexp(-1).square().mean()
    return (loss, *torch.autograd.grad(loss, list(m.parameters())))


@pytest.mark.parametrize("name", FEATURES)
def test_compiled_blocks_train_as_plain_ones_do(name: str) -> None:
    """With the pure-Python backend: that graphs are captured rightly does not need a compiler."""
    fast, plain = model(**FEATURES[name]), model(**FEATURES[name])
    compile_blocks(fast, backend="aot_eager")
    for a, b in zip(loss_and_gradients(fast), loss_and_gradients(plain), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_one_graph_serves_all_layers() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = model()
    compile_blocks(fast, backend=count)  # type: ignore[arg-type]
    fast(TOKENS).sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("features", [{}, {"n_kv_head": 1, "attn_bias": True}], ids=["plain", "grouped"])
def test_compiled_blocks_make_queries_keys_and_values_by_one_product(features: dict[str, object]) -> None:
    products = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        products.append(sum(n.target is torch._C._nn.linear for n in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    fast, plain = model(**features), model(**features)
    compile_blocks(fast, backend=count)  # type: ignore[arg-type]
    for a, b in zip(loss_and_gradients(fast), loss_and_gradients(plain), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert products == [4], "q, k and v in one; output; and the MLP's two"


def test_taps_see_on_the_compiled_path_what_they_see_on_the_plain_one() -> None:
    fast, plain = model(), model()
    compile_blocks(fast, backend="aot_eager")
    fast(TOKENS)  # compiled before anybody looks: a later watcher must not be overlooked
    with Taps(read=["*"]) as seen, Taps(read=["*"]) as expected:
        logits = fast(TOKENS, seen)
        plain(TOKENS, expected)
    assert seen.acts.keys() == expected.acts.keys()
    assert all(torch.equal(seen[site], expected[site]) for site in plain.sites())
    assert torch.allclose(fast(TOKENS), logits, atol=1e-5)  # and what was seen is what the fast path computes


def test_what_a_compiled_block_returns_is_what_taps_read_at_its_site() -> None:
    fast = model()
    compile_blocks(fast, backend="aot_eager")
    with Taps(read=["blocks.*.resid_post"]) as taps:
        fast(TOKENS, taps)
    x, where = fast.embed(TOKENS), fast.where(TOKENS.shape[1])[0]
    for i, block in enumerate(fast.blocks):
        x = fast.run_block(block, x, where, None, None)
        assert torch.allclose(x, taps[f"blocks.{i}.resid_post"], atol=1e-5)


def test_a_failing_compiler_costs_speed_and_not_the_run() -> None:
    def broken(graph: torch.fx.GraphModule, _: object) -> object:
        raise OSError("no space for kernels")

    torch._dynamo.reset()
    fast, plain = model(), model()
    compile_blocks(fast, backend=broken)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="no space for kernels"):
        assert torch.equal(fast(TOKENS), plain(TOKENS))
    assert not is_compiled(fast)


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "cpp_compiler", lambda: None)
    with pytest.raises(UsageError, match="compile = 'off'"):
        compile_blocks(model())


def test_plain_blocks_come_back() -> None:
    fast = model()
    compile_blocks(fast, backend="aot_eager")
    assert is_compiled(fast)
    plain_blocks(fast)
    assert fast.run_block is Block.__call__
