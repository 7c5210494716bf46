"""Gradient estimates are exact where the model is linear, as the formulas say elsewhere, and correlated."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import (
    Place,
    activation_gradients,
    attention_inputs,
    attribution_patching,
    components,
    patch_activations,
    stream,
)
from glasshouse.interp.metric import Contrast
from glasshouse.model import GPT
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, give, make, measure
from interp.dice import thrown


def linear_model() -> GPT:
    """No norms, even attention, and MLP units that are always on: linear in every activation but q and k."""
    shape = {"norm": "none", "mlp": "plain", "activation": "relu", "mlp_bias": True, "n_layer": 2}
    model = thrown(0, 0.1, **shape).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.zero_()  # type: ignore[union-attr, operator]
            block.mlp.up.bias.fill_(50.0)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_on_a_linear_model_the_estimate_is_exact(direction: str) -> None:
    model, data = linear_model(), contrast()
    places = [
        *components(model),
        *stream(model, range(6)),
        Place("blocks.1.v", 2),
        Place("blocks.0.mlp_post"),
    ]
    exact = patch_activations(model, data, places, direction=direction)  # type: ignore[arg-type]
    linear = attribution_patching(model, data, places, direction=direction)  # type: ignore[arg-type]
    assert torch.allclose(exact.per_row, linear.per_row, atol=1e-6)
    assert exact.names == linear.names and torch.allclose(exact.gap, linear.gap)  # type: ignore[arg-type]
    assert linear.correlation(exact).value == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_the_gradient_is_that_of_central_differences_of_the_equations(shape: str) -> None:
    model, data = make(shape), contrast(2)
    sites = ["blocks.0.z", "blocks.1.mlp_out", "embed"]
    _, acts, grads = activation_gradients(model, data.clean, data.metric, torch.arange(2), sites)
    for site, part, at in (
        ("blocks.0.z", ("z", 0, 1), (1, 2, 3)),
        ("blocks.1.mlp_out", ("mlp_out", 1), (4, 5)),
        ("embed", "embed", (2, 7)),
    ):
        for i in range(2):
            moved = []
            for step in (1e-4, -1e-4):
                here = acts[site][i].clone()
                here[at] += step
                value = here[1] if part == ("z", 0, 1) else here
                moved.append(measure(data, i, forward(model, data.clean[i], {part: give(value)})["logits"]))
            assert float(grads[site][i][at]) == pytest.approx((moved[0] - moved[1]) / 2e-4, abs=2e-4)


def test_parameters_get_no_gradient_and_keep_their_wish_for_one() -> None:
    model, data = make("pre-norm"), contrast()
    model.embed.weight.requires_grad_(False)
    attribution_patching(model, data)
    assert all(p.grad is None for p in model.parameters())
    assert not model.embed.weight.requires_grad and model.blocks[0].attn.q.weight.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", ["pre-norm", "grouped, qk-norm", "caps, window, both norms"])
def test_the_qk_fix_is_exact_where_the_model_is_linear_in_the_pattern(shape: str) -> None:
    """The metric as a linear function of the last layer's patterns: then only the softmax could be wrong."""
    model, data = make(shape, seed=3), contrast(4)

    def through_pattern(place: Place) -> float:
        """By hand, the change of gradient . pattern on row 0."""
        i, (site, layer) = 0, ("blocks.1.pattern", 1)
        _, acts, grads = activation_gradients(model, data.corrupt[:1], row0.metric, torch.arange(1), [site])
        clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
        c, K = model.config, model.config.head_width
        total = 0.0
        groups = c.n_head // (c.kv_heads if place.part == "k" else c.n_head)
        for h in range(place.head * groups, (place.head + 1) * groups):  # type: ignore[operator]
            side = {s: corrupt[(s, layer, h)] for s in "qk"}
            side[place.part] = give(clean[(place.part, layer, h)], place.pos)(side[place.part])
            for t in range(6):
                low = max(0, t - c.window_tokens + 1) if c.windowed(layer) else 0
                score = side["k"][low : t + 1] @ side["q"][t] * (c.attn_scale or K**-0.5)
                if c.attn_softcap is not None:
                    score = c.attn_softcap * torch.tanh(score / c.attn_softcap)
                new = torch.zeros(6, dtype=torch.float64)
                new[low : t + 1] = score.softmax(0)
                total += float(grads[site][0, h, t] @ (new - acts[site][0, h, t]))
        return total

    row0 = data.rows(torch.tensor([0]))
    heads = model.config.kv_heads
    for place in (
        Place("blocks.1.q", 2), Place("blocks.1.q", 0, 5), Place("blocks.1.k", heads - 1),
        Place("blocks.1.k", 0, 2), Place("blocks.1.k", heads - 1, 3),
    ):  # fmt: skip
        found = attribution_patching(model, row0, [place])
        assert float(found.per_row[0, 0]) == pytest.approx(through_pattern(place), abs=1e-6), place.name
        assert "QK fix" in found.method


def test_with_sharp_attention_the_qk_fix_is_nearer_to_exact_patching() -> None:
    """Kramar et al.'s case: a saturated softmax, whose gradient says that nothing can change."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(3):
        model = thrown(seed, 0.3, n_layer=2).double()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.q.weight.mul_(6)  # type: ignore[union-attr, operator]
        data = contrast(16, seed=seed)
        places = [p for p in attention_inputs(model) if p.part in "qk"]
        exact = patch_activations(model, data, places)
        for fix in errors:
            rough = attribution_patching(model, data, places, qk_fix=fix)
            errors[fix] += float((rough.per_row - exact.per_row).abs().mean())
    assert errors[True] < 0.8 * errors[False]


def test_agreement_with_exact_patching_is_a_number_with_an_interval() -> None:
    model, data = make("pre-norm"), contrast(64)
    exact, rough = patch_activations(model, data), attribution_patching(model, data)
    score = rough.correlation(exact)
    assert score.low <= score.value <= score.high <= 1.0 and score.n == 64
    assert score.low > 0 and score.value > 0.8
    flat = type(exact)(exact.names, torch.ones_like(exact.per_row), "x", "m", exact.cells, exact.gap)
    with pytest.raises(UsageError, match="same everywhere"):
        flat.correlation(exact)
    with pytest.raises(UsageError, match="same rows in both"):
        rough.correlation(patch_activations(model, data, components(model)[:5]))


def test_chunks_of_rows_change_nothing() -> None:
    model, data = make("grouped, qk-norm"), contrast(7)
    places = [*components(model), *attention_inputs(model)]
    one, many = (attribution_patching(model, data, places, sequences=s) for s in (2, 64))
    assert torch.allclose(one.per_row, many.per_row, atol=1e-9)


def test_a_metric_that_ignores_the_model_has_no_gradient() -> None:
    model, data = make("pre-norm"), contrast()
    silent = Contrast(data.clean, data.corrupt, lambda logits, rows: torch.ones(len(rows)))
    with pytest.raises(UsageError, match="does not depend on the logits"):
        attribution_patching(model, silent)
