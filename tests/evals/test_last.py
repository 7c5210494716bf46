"""The read-out's forward pass is the model's own, at one position: every kind of block, cache and stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glasshouse.evals.last import continued, last_hidden, some_logits
from glasshouse.model import GPT, GPTConfig, KVCache, Taps

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, grouped, normed queries": {"mlp": "gated", "activation": "silu", "n_kv_head": 2, "qk_norm": True},
    "layer norm, learned positions, parallel": {"norm": "layer", "position": "learned", "parallel": True},
    "norms after": {"norm_place": "post", "value_residual": True},
    "norms around, windows, caps": {
        "norm_place": "both",
        "window_tokens": 5,
        "full_layers": (1,),
        "attn_softcap": 20.0,
        "logit_softcap": 10.0,
        "embed_scale": 4.9,
        "norm_offset": True,
    },
    "untied": {"tied": False},
}


def made(kind: str) -> GPT:
    shape = {"vocab_size": 60, "context": 24, "d_model": 24, "n_layer": 3, "n_head": 4} | KINDS[kind]
    model = GPT(GPTConfig(**shape)).eval()
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=dice) * 0.2)
    return model


def rows(n: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [n, length], the position that each row is read at [n])"""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(60, (n, length), generator=dice), torch.randint(length, (n,), generator=dice)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_equals_the_whole_forward_pass_read_there(kind: str) -> None:
    model, (tokens, last) = made(kind), rows(7, 16)
    sites = [f"blocks.{i}.resid_post" for i in range(3)]
    with Taps(read=sites) as taps:
        whole = model.hidden(tokens, taps)
    stream: list[torch.Tensor] = []
    found = last_hidden(model, tokens, last, stream=stream)
    at = torch.arange(7)
    assert torch.allclose(found, whole[at, last], atol=1e-5)
    assert len(stream) == 3
    for site, seen in zip(sites, stream, strict=True):
        assert torch.allclose(seen, taps[site][at, last], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_after_a_cached_prefix_it_equals_the_pass_over_both(kind: str) -> None:
    model, (tokens, _) = made(kind), rows(5, 14)
    tokens[:, :6] = tokens[0, :6]
    cache = KVCache(model.config, 1, 6, torch.float32, torch.device("cpu"))
    model.hidden(tokens[:1, :6], cache=cache)
    shared = cache.expand(5, 14)
    last = torch.tensor([7, 7, 3, 0, 5])
    found = last_hidden(model, tokens[:, 6:], last, shared)
    assert torch.allclose(found, model.hidden(tokens)[torch.arange(5), 6 + last], atol=1e-5)
    assert shared.length == 14


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_some_logits_are_those_columns_of_all(kind: str) -> None:
    model, (tokens, last) = made(kind), rows(4, 9)
    hidden, chosen = last_hidden(model, tokens, last), (3, 59, 3, 0)
    assert torch.allclose(
        some_logits(model, hidden, chosen), model.unembed(hidden)[:, list(chosen)], atol=1e-6
    )


def test_gradients_reach_the_embeddings_as_through_the_whole_model() -> None:
    model, (tokens, last) = made("plain"), rows(3, 10)
    x = model.embed(tokens).detach().requires_grad_(True)
    (short,) = torch.autograd.grad(some_logits(model, continued(model, x, last), (4, 9)).sum(), x)
    model.embed.weight.requires_grad_(True)
    held: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: torch.Tensor) -> None:
        held.append(out)

    hook = model.embed.register_forward_hook(keep)
    whole = model(tokens)[torch.arange(3), last][:, [4, 9]].sum()
    hook.remove()
    (long,) = torch.autograd.grad(whole, held[0])
    assert torch.allclose(short, long, rtol=1e-3, atol=1e-5) and float(short.abs().max()) > 1e-4


def test_a_row_longer_than_the_context_is_refused() -> None:
    model, (tokens, last) = made("plain"), rows(2, 25)
    with pytest.raises(ValueError, match="exceed the model's context of 24"):
        last_hidden(model, tokens, last)
    cache = KVCache(model.config, 2, 24, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.hidden(tokens[:, :20], cache=cache)
        with pytest.raises(ValueError, match="25 positions"):
            last_hidden(model, tokens[:, 20:], torch.tensor([4, 4]), cache)
