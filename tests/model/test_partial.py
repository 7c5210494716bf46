from __future__ import annotations

import pytest
import torch

from glasshouse.model import GPT, GPTConfig
from glasshouse.model.attend import BLOCK_ROWS
from glasshouse.model.partial import hidden_at
from model.conftest import SHAPES, make
from model.shapes import FITTING, noisy

ROLES = {"segment": True, "rotate": True, "layers": True, "markers": ((44, 0), (46, 1), (49, 4))}
SOME = {
    **{f"shape {name}": lambda name=name: make(name) for name in SHAPES},
    **{f"family {name}": lambda name=name: make(FITTING[name][0], **FITTING[name][1]) for name in FITTING},
    "windowed last": lambda: make(window_tokens=4, full_layers=(0,)),
    "sees all": lambda: make(causal=False),
    "value residual": lambda: make(value_residual=True),
    "reads roles": lambda: noisy(roles=ROLES, vocab_size=53, context=32, d_model=16, n_layer=2, n_head=4),
    "one layer": lambda: make(n_layer=1),
}


def places(kind: str, rows: int, width: int) -> torch.Tensor:
    """Which positions are read: an answer's span, one a row, any, or none in some rows."""
    at = torch.zeros(rows, width, dtype=torch.bool)
    match kind:
        case "spans":
            for i in range(rows):
                at[i, 2 + i : 5 + 3 * i] = True
        case "ends":
            at[torch.arange(rows), torch.arange(rows) * 3 + 1] = True
        case "scattered":
            at = torch.rand(rows, width, generator=torch.Generator().manual_seed(3)) < 0.3
            at[1] = False
    return at


@pytest.mark.parametrize("which", SOME)
@pytest.mark.parametrize("kind", ["spans", "ends", "scattered"])
def test_what_is_read_at_some_positions_is_the_whole_pass_there_with_its_gradients(which, kind):
    model = SOME[which]()
    tokens = torch.randint(0, 53, (4, 18), generator=torch.Generator().manual_seed(5))
    at = places(kind, 4, 18)
    found, gradients = [], []
    for x in (hidden_at(model, tokens, at), model.hidden(tokens)[at]):
        weights = torch.linspace(-1, 1, x.numel()).view_as(x)
        model.zero_grad()
        (x * weights).sum().backward()
        found.append(x.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-4, atol=2e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("which", SOME)
def test_without_gradients_too(which):
    model, tokens = SOME[which](), torch.arange(36).view(2, 18)
    at = places("spans", 2, 18)
    torch.testing.assert_close(hidden_at(model, tokens, at), model.hidden(tokens)[at], rtol=1e-5, atol=1e-5)


def test_more_positions_than_a_block_of_attention_holds_see_what_they_should():
    config = GPTConfig(vocab_size=53, context=256, d_model=16, n_layer=2, n_head=4)
    model = noisy(**config.model_dump())
    tokens = torch.randint(0, 53, (2, 256), generator=torch.Generator().manual_seed(5))
    at = torch.zeros(2, 256, dtype=torch.bool)
    at[0, 20:], at[1, :60], at[1, 100:] = True, True, True
    assert int(at[0].sum()) > BLOCK_ROWS
    torch.testing.assert_close(hidden_at(model, tokens, at), model.hidden(tokens)[at], rtol=1e-5, atol=1e-5)


def test_nothing_read_is_nothing(tiny):
    model: GPT = tiny()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert hidden_at(model, tokens, torch.zeros(2, 5, dtype=torch.bool)).shape == (0, 16)


def test_rows_beyond_the_context_are_refused(tiny):
    tokens = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        hidden_at(tiny(), tokens, torch.ones(1, 33, dtype=torch.bool))
