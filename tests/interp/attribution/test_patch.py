"""Patching and ablation equal a forward pass from the equations with one part exchanged, one at a time."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import (
    Place,
    ablate,
    attention_inputs,
    components,
    patch_activations,
    stream,
)
from glasshouse.interp.attribution.places import node
from glasshouse.model import GPT
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, give, make, measure


def changes(model: GPT, place: Place, source: dict[object, torch.Tensor]) -> byhand.Change:
    """The change by hand that a place stands for."""
    layer, part = place.layer, place.part
    if part == "embed":
        return {"embed": give(source["embed"], place.pos)}
    if part in ("mlp_out", "resid_post", "attn_out"):
        return {(part, layer): give(source[(part, layer)], place.pos)}
    shared = model.config.n_head // (model.config.kv_heads if part in "kv" else model.config.n_head)
    heads = range(place.head * shared, (place.head + 1) * shared)  # type: ignore[operator]
    return {(part, layer, h): give(source[(part, layer, h)], place.pos) for h in heads}


@pytest.mark.parametrize("shape", byhand.SHAPES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_place_equals_a_single_edit_of_the_equations(shape: str, direction: str) -> None:
    model, data = make(shape), contrast(2)
    places = [*components(model), *attention_inputs(model), *stream(model, [1, 2]), Place("blocks.1.z", 1, 4)]
    found = patch_activations(model, data, places, direction=direction, sequences=5)  # type: ignore[arg-type]
    sign = 1 if direction == "denoise" else -1
    for i in range(2):
        clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        row = data.corrupt[i] if direction == "denoise" else data.clean[i]
        assert float(found.gap[i]) == pytest.approx(  # type: ignore[index]
            measure(data, i, clean["logits"]) - measure(data, i, corrupt["logits"]), abs=1e-4
        )
        for p, place in enumerate(places):
            logits = forward(model, row, changes(model, place, source))["logits"]
            expected = sign * (measure(data, i, logits) - measure(data, i, base["logits"]))
            assert float(found.per_row[p, i]) == pytest.approx(expected, abs=1e-4), place.name


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
@pytest.mark.parametrize("shape", ["grouped, qk-norm", "caps, window, both norms"])
def test_ablation_equals_the_equations_with_the_part_replaced(shape: str, kind: str) -> None:
    model, data = make(shape), contrast(4)
    places = components(model)
    found = ablate(model, data.clean, data.metric, places, kind=kind, seed=3, sequences=3)  # type: ignore[arg-type]
    runs = [forward(model, row) for row in data.clean]
    drawn = torch.randint(1, 4, (4,), generator=torch.Generator().manual_seed(3))
    for i in range(4):
        for p, place in enumerate(places):
            key = (
                (place.part, place.layer, place.head) if place.head is not None else ("mlp_out", place.layer)
            )
            value = {
                "zero": torch.zeros_like(runs[0][key]),
                "mean": torch.stack([run[key] for run in runs]).mean(0),
                "resample": runs[(i + int(drawn[i])) % 4][key],
            }[kind]
            logits = forward(model, data.clean[i], {key: give(value)})["logits"]
            expected = measure(data, i, runs[i]["logits"]) - measure(data, i, logits)
            assert float(found.per_row[p, i]) == pytest.approx(expected, abs=1e-4), place.name
    assert kind.removesuffix("e") in found.method and found.n == 4


def test_ablating_several_together_is_one_run_of_the_equations_without_them() -> None:
    model, data = make("grouped, qk-norm"), contrast(3)
    found = ablate(model, data.clean, data.metric, ["a0.h1", "a0.h2", "m1"], kind="zero", together=True)
    assert found.names == ("a0.h1+a0.h2+m1",) and "together" in found.method
    parts = [("z", 0, 1), ("z", 0, 2), ("mlp_out", 1)]
    for i in range(3):
        logits = forward(model, data.clean[i], {part: torch.zeros_like for part in parts})["logits"]
        lost = measure(data, i, forward(model, data.clean[i])["logits"]) - measure(data, i, logits)
        assert float(found.per_row[0, i]) == pytest.approx(lost, abs=1e-4)


def test_a_share_is_the_mean_effect_over_the_mean_gap_and_its_interval_holds_it() -> None:
    model, data = make("pre-norm"), contrast(12)
    found = patch_activations(model, data, ["a0.h0", "m1", "input@2"])
    assert found["input@2"].value == pytest.approx(1.0, abs=1e-5)  # only this token differs
    assert found["input@2"].high - found["input@2"].low < 1e-5
    score, at = found["m1"], found.names.index("m1")
    assert found.gap is not None
    assert score.value == pytest.approx(float(found.per_row[at].mean() / found.gap.mean()))
    assert score.low <= score.value <= score.high and score.n == 12


def test_names_lead_to_places_and_back() -> None:
    model = make("grouped, qk-norm")
    for place in [*components(model, [0, 3]), *attention_inputs(model), *stream(model, [2])]:
        assert node(place.name, model) == place
    with pytest.raises(UsageError, match="Did you mean 'blocks.1.resid_post'"):
        node("blocks.1.resid_pots", model)
    with pytest.raises(UsageError, match="no place 'a1.h4'"):
        node("a1.h4", model)
    with pytest.raises(UsageError, match="no place 'blocks.0.k.h2'"):
        node("blocks.0.k.h2", model)  # two key heads only
    with pytest.raises(UsageError, match="positions 0 to 5"):
        patch_activations(model, contrast(), ["m1@6"])


def test_rows_that_do_not_fit_are_refused() -> None:
    model, data = make("pre-norm"), contrast()
    with pytest.raises(UsageError, match="longer than the model's context"):
        ablate(model, torch.zeros(2, 17, dtype=torch.long), data.metric)
    with pytest.raises(UsageError, match="the model has 0 to 23"):
        ablate(model, torch.full((2, 4), 24), data.metric)
    with pytest.raises(UsageError, match="token ids"):
        ablate(model, torch.zeros(0, 4, dtype=torch.long), data.metric)
    with pytest.raises(UsageError, match="two or more reference rows"):
        ablate(model, data.clean[:1], data.metric)
    with pytest.raises(UsageError, match="'denoise' or 'noise'"):
        patch_activations(model, data, direction="denoised")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="zero' or|'zero', 'mean' or"):
        ablate(model, data.clean, data.metric, kind="mena")  # type: ignore[arg-type]
    same = type(data)(data.clean, data.clean.clone(), data.metric)
    with pytest.raises(UsageError, match="same on clean and corrupt"):
        patch_activations(model, same)


def test_activations_with_nan_are_named() -> None:
    model, data = make("pre-norm"), contrast()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UsageError, match="not finite"):
        patch_activations(model, data)
    with pytest.raises(UsageError, match="not finite.*NaN"):
        ablate(model, data.clean, data.metric)


def test_results_show_themselves_and_escape_what_they_are_given() -> None:
    model, data = make("pre-norm"), contrast()
    found = patch_activations(model, data)
    html = found._repr_html_()
    assert "<svg" in html and "clean into corrupt" in html and "n = 5" in html
    named = type(found)(("<b>",), found.per_row[:1], "<script>", "m", (("<i>", "x"),), found.gap)
    assert "<script>" not in named._repr_html_() and "<b>" not in named._repr_html_()
    assert "interchange" in str(found)
