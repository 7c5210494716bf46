"""Attention knockout equals softmax over the keys that are left, one query at a time."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import Knockout, attention_knockout, each_head
from glasshouse.interp.attribution.knockout import edges
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, make, measure


@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_every_knockout_equals_the_equations(shape: str) -> None:
    model, data = make(shape), contrast(3)
    keys = torch.tensor([[2, 0], [1, 1], [3, 2]])  # each row its own
    tried = [*each_head(model), Knockout((0, 1)), Knockout((1,), (0, 3))]
    found = attention_knockout(
        model, data.clean, data.metric, queries=[-1, 4], keys=keys, knockouts=tried, sequences=7
    )
    blocked = edges(3, 6, [-1, 4], keys)
    for i in range(3):
        whole = measure(data, i, forward(model, data.clean[i])["logits"])
        for j, k in enumerate(tried):
            change = {
                ("blocked", layer, h): lambda _, i=i: blocked[i]
                for layer in k.layers
                for h in (range(4) if k.heads is None else k.heads)
            }
            logits = forward(model, data.clean[i], change)["logits"]
            lost = whole - measure(data, i, logits)
            assert float(found.per_row[j, i]) == pytest.approx(lost, abs=1e-4), k.name


def test_edges_that_were_never_there_change_nothing() -> None:
    model, data = make("pre-norm"), contrast()
    found = attention_knockout(model, data.clean, data.metric, queries=1, keys=[2, 3, 4])
    assert float(found.per_row.abs().max()) < 1e-9


def test_windows_go_around_each_layer() -> None:
    model, data = make("pre-norm"), contrast()
    found = attention_knockout(model, data.clean, data.metric, queries=-1, keys=0, window=2)
    assert found.names == ("layers 0-1", "layer 1")
    assert "<svg" in found._repr_html_()


def test_a_query_that_would_see_nothing_is_refused_and_so_are_positions_outside() -> None:
    model, data = make("caps, window, both norms"), contrast()

    def run(**more: object) -> None:
        attention_knockout(model, data.clean, data.metric, **more)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="row 0: position 0 would see nothing in layer 0"):
        run(queries=[0], keys=[0])
    with pytest.raises(UsageError, match="position 5 would see nothing in layer 0"):
        run(queries=5, keys=[2, 3, 4, 5])  # its window is four wide there
    with pytest.raises(UsageError, match="positions 0 to 5"):
        run(queries=6, keys=0)
    with pytest.raises(UsageError, match="for 2 rows were given; there are 5"):
        run(queries=torch.tensor([1, 2]), keys=0)
    with pytest.raises(UsageError, match="layers \\(2,\\)"):
        run(queries=5, keys=0, knockouts=[Knockout((2,))])
    with pytest.raises(UsageError, match="heads \\(4,\\)"):
        run(queries=5, keys=0, knockouts=[Knockout((1,), (4,))])
