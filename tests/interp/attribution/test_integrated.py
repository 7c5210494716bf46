"""Integrated gradients are complete, agree with calculus, and say how far they are from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import erasure, gradient_times_input, integrated_gradients
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, give, make, measure


@pytest.mark.parametrize("shape", [s for s in byhand.SHAPES if "value" not in s])
def test_attributions_add_up_to_what_the_metric_changed_by(shape: str) -> None:
    model, data = make(shape), contrast(3)
    found = integrated_gradients(model, data.clean, data.metric, tolerance=0.001, baseline=data.corrupt)
    for i in range(3):
        clean, corrupt = (forward(model, rows[i])["logits"] for rows in (data.clean, data.corrupt))
        gap = measure(data, i, clean) - measure(data, i, corrupt)
        assert float(found.total[i]) == pytest.approx(gap, abs=1e-4)
        assert float(found.values[i].sum()) == pytest.approx(gap, abs=0.01 + 0.01 * abs(gap))
    assert found.incomplete.value <= 0.001 and found.convergence[-1][1] <= 0.001
    assert float(found.values[:, [0, 1, 3, 4, 5]].abs().max()) == 0  # those tokens are the baseline's


def test_they_equal_a_fine_riemann_sum_of_finite_differences_of_the_equations() -> None:
    model, data = make("gpt2"), contrast(1)
    found = integrated_gradients(model, data.clean, data.metric, baseline="mean", tolerance=1e-4)
    assert found.raw is not None
    end = forward(model, data.clean[0])["embed"]
    start = end.mean(0)
    for at in ((2, 3), (5, 0)):
        total, steps = 0.0, 60
        for m in range(steps):
            moved = []
            for nudge in (1e-4, -1e-4):
                x = start + (end - start) * (m + 0.5) / steps
                x[at] += nudge
                moved.append(measure(data, 0, forward(model, data.clean[0], {"embed": give(x)})["logits"]))
            total += (moved[0] - moved[1]) / 2e-4 / steps * float(end[at] - start[at[1]])
        assert float(found.raw[0][at]) == pytest.approx(total, rel=0.01, abs=1e-3)


def test_more_steps_come_nearer_to_completeness_and_too_few_say_so() -> None:
    model, data = make("pre-norm"), contrast()
    few = integrated_gradients(model, data.clean, data.metric, steps=2, most_steps=2)
    many = integrated_gradients(model, data.clean, data.metric, steps=2, tolerance=0.002)
    assert few.incomplete.value > 0.01 > many.incomplete.value
    assert [m for m, _ in many.convergence] == [2 * 2**i for i in range(len(many.convergence))]
    assert many.convergence[-1][1] < many.convergence[0][1]
    assert few.incomplete.low <= few.incomplete.value <= few.incomplete.high and few.incomplete.n == 5


@pytest.mark.parametrize(
    "site", ["blocks.0.resid_post", "blocks.1.z", "blocks.1.mlp_out", "blocks.1.pattern"]
)
def test_any_site_can_be_attributed_to(site: str) -> None:
    model, data = make("grouped, qk-norm"), contrast()
    found = integrated_gradients(model, data.clean, data.metric, site=site, tolerance=0.005)
    assert found.values.shape == (5, 6) and found.incomplete.value <= 0.005
    assert float((found.values.sum(1) - found.total).abs().max()) < 0.1


def test_on_a_linear_metric_one_gradient_is_enough() -> None:
    model, data = make("value residual, no norm"), contrast()

    def linear(logits: Tensor, rows: Tensor) -> Tensor:
        return logits[:, -1, 3]

    site = "blocks.1.resid_post"  # no norm after it: the head is linear
    one = gradient_times_input(model, data.clean, linear, site=site)
    whole = integrated_gradients(model, data.clean, linear, site=site, steps=1)
    assert torch.allclose(one.values, whole.values) and one.incomplete.value < 1e-6


def test_erasure_is_one_edit_of_the_equations_for_each_position() -> None:
    model, data = make("caps, window, both norms"), contrast(2)
    found = erasure(model, data.clean, data.metric, baseline=data.corrupt)
    for i in range(2):
        clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
        for t in range(6):
            logits = forward(model, data.clean[i], {"embed": give(corrupt["embed"], t)})["logits"]
            lost = measure(data, i, clean["logits"]) - measure(data, i, logits)
            assert float(found.values[i, t]) == pytest.approx(lost, abs=1e-4)


def test_tokens_are_shown_escaped_and_baselines_that_cannot_be_are_refused() -> None:
    model, data = make("pre-norm"), contrast()
    words = [f"<b>{i}" for i in range(24)]
    html = integrated_gradients(model, data.clean, data.metric, words=words)._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html and "16 steps" in html
    with pytest.raises(UsageError, match="Did you mean 'embed'"):
        integrated_gradients(model, data.clean, data.metric, site="embd")
    with pytest.raises(UsageError, match="baseline rows are"):
        integrated_gradients(model, data.clean, data.metric, baseline=data.clean[:2])
    with pytest.raises(UsageError, match="same at the baseline"):
        integrated_gradients(model, data.clean, data.metric, baseline=data.clean)
    with pytest.raises(UsageError, match="'mean', 'zero' or rows"):
        integrated_gradients(model, data.clean, data.metric, baseline="blur")  # type: ignore[arg-type]
