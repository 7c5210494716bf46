"""The parts of a logit are what the equations say, and add up to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import (
    attribution_by_position,
    attribution_of,
    direct_logit_attribution,
)
from glasshouse.interp.metric import LogitDifference
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, make, measure


@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_the_parts_add_up_to_the_logit_difference_of_the_equations(shape: str) -> None:
    model, data = make(shape), contrast()
    assert isinstance(data.metric, LogitDifference)
    found = attribution_of(model, data.clean, data.metric)
    for i in range(5):
        expected = measure(data, i, forward(model, data.clean[i])["logits"])
        assert float(found.per_row[:, i].sum()) == pytest.approx(expected, abs=1e-4)
        assert float(found.total[i]) == pytest.approx(expected, abs=1e-4)
    assert found.inexact < 1e-4
    assert {"input", "a0.h0", "a1.h3", "m0", "m1"} <= set(found.names)


@torch.no_grad()
@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_each_part_is_the_change_when_its_vector_leaves_a_stream_whose_norms_are_held(shape: str) -> None:
    """Independent of how parts are pulled back: vectors are pushed forward, by formulas, one head a time."""
    model, data = make(shape), contrast(3)
    assert isinstance(data.metric, LogitDifference)
    c, found = model.config, attribution_of(model, data.clean, data.metric)
    for i in range(3):
        run, at = forward(model, data.clean[i]), int(data.metric.at[i])
        for name, value in zip(found.names, found.per_row[:, i].tolist(), strict=True):
            if name[0] not in "am" or "bias" in name:
                continue
            layer = int(name[1:].split(".")[0])
            b: Any = model.blocks[layer]
            if name[0] == "a":
                K, h = c.head_width, int(name.split(".h")[1])
                vector = b.attn.o.weight[:, h * K : (h + 1) * K] @ run[("z", layer, h)][at]
                every = [run[("z", layer, j)][at] for j in range(c.n_head)]
                whole = b.attn.o.weight @ torch.cat(every)
                post, bias = b.post1, b.attn.o.bias
            else:
                post, bias = b.post2, b.mlp.down.bias
                if isinstance(post, torch.nn.Identity):
                    vector = run[("mlp_out", layer)][at] - (0 if bias is None else bias)
                else:
                    continue  # inverting a norm proves nothing; its sum is tested above
                whole = vector
            whole = whole if bias is None else whole + bias
            vector = held(post, c, vector, whole)
            vector = held(model.norm, c, vector, run[("resid_post", c.n_layer - 1)][at])
            raw = model.head_weight @ vector
            if c.logit_softcap is not None:  # each logit at its own ratio of capped to uncapped
                capped = run["logits"][at]
                raw = raw * capped / (c.logit_softcap * torch.atanh(capped / c.logit_softcap))
            expected = float(raw[data.metric.right[i]] - raw[data.metric.wrong[i]])
            assert value == pytest.approx(expected, abs=1e-4), name


def held(p: Any, c: Any, vector: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The linear part of a norm with the spread of ``whole``."""
    if isinstance(p, torch.nn.Identity):
        return vector
    if c.norm == "layer":
        spread = (whole - whole.mean()).square().mean() + c.norm_eps
        return (vector - vector.mean()) / spread.sqrt() * p.weight
    gain = p.weight + 1 if c.norm_offset else p.weight
    return vector / (whole.square().mean() + c.norm_eps).sqrt() * gain


@pytest.mark.parametrize("shape", ["grouped, qk-norm", "post-norm", "value residual, no norm"])
def test_heads_split_by_source_position_add_up_to_the_head(shape: str) -> None:
    model, data = make(shape), contrast()
    metric: Any = data.metric
    found = direct_logit_attribution(model, data.clean, metric.right, metric.wrong, metric.at, sources=True)
    assert found.sources is not None
    for j, head in enumerate(found.heads):
        whole = found.per_row[found.names.index(head)]
        assert torch.allclose(found.sources[j].sum(-1).double(), whole, atol=1e-4)
    later = torch.arange(6)[None] > metric.at[:, None]
    assert float(found.sources[:, later].abs().max()) == 0  # no head moves anything from the future


def test_attribution_at_every_position_adds_up_to_the_models_logits() -> None:
    model, data = make("gpt2"), contrast()
    names, parts, total = attribution_by_position(model, data.clean)
    with torch.no_grad():
        logits = model(data.clean)[:, :-1].gather(-1, data.clean[:, 1:, None])[..., 0]
    assert torch.allclose(total.double(), logits, atol=1e-4)
    assert torch.allclose(parts.sum(0).double(), logits, atol=1e-4)
    assert len(names) == len(parts) and "position" in names and "a1.bias" in names


def test_a_single_logit_and_several_right_tokens_are_allowed() -> None:
    model, data = make("pre-norm"), contrast()
    right = torch.randint(0, 24, (5, 3), generator=torch.Generator().manual_seed(0))
    found = direct_logit_attribution(model, data.clean, right)
    with torch.no_grad():
        expected = model(data.clean)[:, -1].gather(1, right).mean(1)
    assert torch.allclose(found.total.double(), expected, atol=1e-4)
    assert "<svg" in found._repr_html_() and "add up to the whole" in found._repr_html_()


def test_tokens_and_positions_that_do_not_exist_are_refused() -> None:
    model, data = make("pre-norm"), contrast()
    with pytest.raises(UsageError, match="ids 0 to 23"):
        direct_logit_attribution(model, data.clean, torch.full((5,), 24))
    with pytest.raises(UsageError, match="positions 0 to 5"):
        direct_logit_attribution(model, data.clean, torch.zeros(5, dtype=torch.long), at=6)
    with pytest.raises(UsageError, match="none that follows"):
        attribution_by_position(model, data.clean[:, :1])
