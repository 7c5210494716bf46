from __future__ import annotations

from functools import partial

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.metric import LogitDifference
from glasshouse.interp.reading import frozen, gradients
from glasshouse.model import GPT, Taps
from model.shapes import FITTING, noisy

TOKENS = torch.randint(0, 53, (3, 8), generator=torch.Generator().manual_seed(4))
SHAPE = {"vocab_size": 53, "context": 16, "d_model": 16, "n_layer": 2, "n_head": 4}
METRIC = LogitDifference(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([7, 5, 7]))


@pytest.fixture(scope="module")
def model() -> GPT:
    return noisy(**SHAPE)


def test_gradients_with_parameters_frozen_are_those_of_the_whole_graph(model):
    found = gradients(model, TOKENS, METRIC, ["*"])
    with Taps(read=["*"]) as taps:
        value = METRIC(model(TOKENS, taps), torch.arange(3))
    sites = model.sites()
    expected = torch.autograd.grad(value.sum(), [taps[site] for site in sites])
    assert torch.allclose(found.value, value)
    for site, gradient in zip(sites, expected, strict=True):
        assert torch.allclose(found.grads[site], gradient, atol=1e-5), site
        assert torch.equal(found.acts[site], taps[site].detach()), site
        assert not found.acts[site].requires_grad


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "olmo2", "qwen3"])
def test_a_step_along_the_gradient_changes_the_metric_as_it_says(family):
    shape, features = FITTING[family]
    base = {"n_kv_head": 2, "mlp": "gated", "activation": "silu"} if shape == "grouped" else {}
    model = noisy(**{**SHAPE, **base, **features})
    for site in ("embed", "blocks.0.v", "blocks.1.k", "blocks.1.mlp_post"):
        found = gradients(model, TOKENS, METRIC, site)
        step = 1e-2 * found.grads[site] / found.grads[site].norm()
        with torch.no_grad():
            up, down = (
                METRIC(
                    model(TOKENS, Taps(edit={site: partial(torch.add, sign * step)})), torch.arange(3)
                ).sum()
                for sign in (1, -1)
            )
        assert torch.isclose(up - down, 2e-2 * found.grads[site].norm(), rtol=0.05), site


def test_parameters_ask_for_gradients_as_before_whatever_happens(model):
    model.embed.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == before
    with torch.no_grad():
        gradients(model, TOKENS, METRIC, "blocks.*.hook_resid_post")
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    model.embed.weight.requires_grad_(True)


def test_the_gradient_is_that_of_the_edited_computation(model):
    edit = {"blocks.0.mlp_out": torch.zeros_like, "blocks.1.resid_pre": lambda x: 2 * x}
    found = gradients(model, TOKENS, METRIC, ["blocks.1.resid_pre", "blocks.0.attn_out"], edit=edit)
    with Taps(read=["blocks.1.resid_pre", "blocks.0.attn_out"], edit=edit) as taps:
        value = METRIC(model(TOKENS, taps), torch.arange(3)).sum()
    for site in taps.acts:
        (expected,) = torch.autograd.grad(value, taps[site], retain_graph=True)
        assert torch.allclose(found.grads[site], expected, atol=1e-5), site


def test_rows_are_told_to_the_metric_by_their_number(model):
    whole = gradients(model, TOKENS, METRIC, "embed")
    part = gradients(model, TOKENS[1:], METRIC, "embed", rows=torch.tensor([1, 2]))
    assert torch.allclose(part.grads["embed"], whole.grads["embed"][1:], atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (lambda logits, rows: logits.sum(), r"for each of 3 rows; got \[\]"),
        (lambda logits, rows: logits[:, -1, 0] * float("nan"), "3 not finite"),
        (lambda logits, rows: torch.ones(3), "does not depend on any"),
    ],
)
def test_a_metric_that_is_none_is_refused(model, metric, match):
    with pytest.raises(UsageError, match=match):
        gradients(model, TOKENS, metric, "embed")


def test_a_site_that_the_metric_does_not_depend_on_is_named(model):
    edit = {"blocks.1.resid_pre": lambda x: x.detach()}
    with pytest.raises(UsageError, match=r"does not depend on 'blocks\.0\.resid_post'"):
        gradients(model, TOKENS, METRIC, ["blocks.0.resid_post", "blocks.1.mlp_out"], edit=edit)
