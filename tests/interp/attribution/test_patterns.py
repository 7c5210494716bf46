"""Patterns shown are the model's."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import attention_pattern_view
from interp.attribution.byhand import contrast, forward, make


def test_a_pattern_is_that_of_the_equations() -> None:
    model, data = make("grouped, qk-norm"), contrast()
    view = attention_pattern_view(model, data.clean[0], ["a0.h1", "a1.h3"])
    run = forward(model, data.clean[0])
    for head, layer, h in (("a0.h1", 0, 1), ("a1.h3", 1, 3)):
        assert torch.allclose(view[head].sum(-1), torch.ones(6), atol=1e-5)
        mixed = view[head].double() @ run[("v", layer, h)]
        assert torch.allclose(mixed, run[("z", layer, h)], atol=1e-5)
    query, key, share = view.strongest("a0.h1", 1)[0]
    assert share == float(view["a0.h1"][query, key]) == float(view["a0.h1"].max())


def test_a_view_draws_itself_with_words_escaped_and_refuses_what_is_no_head() -> None:
    model, data = make("pre-norm"), contrast()
    html = attention_pattern_view(model, data.clean[0], decode=lambda i: f"<{i}>")._repr_html_()
    assert html.count("<g>") + html.count("<g ") >= 8 and "<svg" in html and "&lt;" in html
    assert attention_pattern_view(model, data.clean[0].tolist(), "a0.h0").heads == ("a0.h0",)
    with pytest.raises(UsageError, match="patterns belong to heads"):
        attention_pattern_view(model, data.clean[0], ["m1"])
    with pytest.raises(UsageError, match="no place 'a7.h0'"):
        attention_pattern_view(model, data.clean[0], "a7.h0")
    with pytest.raises(UsageError, match="one row"):
        attention_pattern_view(model, data.clean)
    with pytest.raises(UsageError, match="is not shown"):
        _ = attention_pattern_view(model, data.clean[0], "a0.h0")["a1.h0"]
