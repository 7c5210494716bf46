"""Components exchanged between runs: the same numbers as patching one by one, and a planted program's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.circuits import Shape, planted_transformer
from glasshouse.interp.circuits.planted import ancestors
from glasshouse.interp.components import (
    component_names,
    exchanged,
    exchanged_along,
    matching,
    propose,
    share,
)
from glasshouse.interp.patching import patch_component
from glasshouse.model import GPT, GPTConfig, Taps
from stirred import stirred


@dataclass(frozen=True)
class Two:
    """Logit of token 1 less that of token 2."""

    def margin(self, logits: Tensor) -> Tensor:
        return logits[..., 1].float() - logits[..., 2].float()


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights in every part, so that every component does something."""
    config = GPTConfig(vocab_size=11, context=12, d_model=16, n_layer=2, n_head=2, activation="gelu")
    return stirred(GPT(config).init_weights(0).eval(), 1)


def twins(n: int = 70) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of several lengths and twins that differ at one place."""
    rng = np.random.default_rng(0)
    base = [rng.integers(11, size=int(rng.integers(4, 12))).tolist() for _ in range(n)]
    source = [[*row[:1], (row[1] + 1 + i % 9) % 11, *row[2:]] for i, row in enumerate(base)]
    return base, source


def test_many_rows_at_once_give_what_patching_one_row_and_component_gives(model: GPT) -> None:
    base, source = twins()
    every = component_names(model.config)
    assert every == ("a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    here, there, mixed = exchanged(model, base, source, Two(), [(name,) for name in every])
    for k, name in enumerate(every):
        layer, _, head = name[1:].partition(".h")
        old_name = f"blocks.{layer}.attn.h{head}" if head else f"blocks.{layer}.mlp"
        for i in range(0, 70, 9):
            assert mixed[k, i] == pytest.approx(
                patch_component(model, source[i], base[i], old_name, Two()), abs=1e-5
            )
    with torch.no_grad():
        for i in range(0, 70, 9):
            for row, value in ((base[i], here[i]), (source[i], there[i])):
                assert value == pytest.approx(
                    float(Two().margin(model(torch.tensor([row]))[0, -1])), abs=1e-5
                )


def test_everything_exchanged_leaves_only_what_the_embedding_itself_says(model: GPT) -> None:
    """Twins differ before the last place, where the embedding reaches the logits only through components."""
    base, source = twins()
    here, there, mixed = exchanged(model, base, source, Two(), [component_names(model.config), ()])
    assert share(here, there, mixed[0]).value == pytest.approx(1.0, abs=1e-4)
    assert mixed[1] == pytest.approx(here)


def residual(model: GPT, row: list[int], site: str) -> Tensor:
    """The residual stream [pos, d_model] of one row."""
    with Taps(read=[site]) as taps:
        model(torch.tensor([row]), taps)
    return taps[site][0]


def test_one_direction_exchanged_is_the_plain_run_with_that_component_replaced(model: GPT) -> None:
    (base, source), site = twins(), "blocks.0.resid_post"
    along = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    here, there, put = exchanged_along(model, base, source, Two(), site, along)
    whole = exchanged(model, base, source, Two(), [])
    assert here == pytest.approx(whole[0]) and there == pytest.approx(whole[1])
    for i in range(0, 70, 9):  # one row at a time, unpadded, by hand
        with torch.no_grad():
            given = residual(model, source[i], site)
            made = residual(model, base[i], site)
            made = made + torch.outer((given - made) @ along, along)
            with Taps(edit={site: lambda x, made=made: made[None]}) as taps:
                value = Two().margin(model(torch.tensor([base[i]]), taps)[0, -1])
        assert put[i] == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_only_what_a_planted_programs_answer_depends_on_moves_it(seed: int) -> None:
    planted = planted_transformer(seed, Shape(n_layer=3, n_head=3))
    contrast, own = planted.contrast(48), ancestors(planted.program, planted.answer)
    base, source = contrast.clean.tolist(), contrast.corrupt.tolist()
    every = component_names(planted.model.config)
    here, there, mixed = exchanged(planted.model, base, source, Two(), [(name,) for name in every])
    found = {name: share(here, there, mixed[k]).value for k, name in enumerate(every)}
    assert max((abs(v) for name, v in found.items() if name not in own), default=0.0) < 1e-3
    assert found[planted.answer] == pytest.approx(1.0, abs=0.02)
    proposed = propose(planted.model, base, source, Two(), 0.05)
    assert planted.answer in proposed and set(proposed) <= own


def test_a_share_is_the_least_squares_slope_and_its_error_is_that_of_drawing_rows_anew() -> None:
    rng = np.random.default_rng(3)
    base, source = rng.normal(size=400), rng.normal(3.0, 1.0, size=400)
    mixed = base + 0.3 * (source - base) + rng.normal(0, 0.4, size=400)
    found = share(base, source, mixed)
    slope = np.linalg.lstsq((source - base)[:, None], mixed - base, rcond=None)[0][0]
    assert found.value == pytest.approx(slope)
    drawn = []
    for _ in range(800):
        at = rng.integers(400, size=400)
        drawn.append(share(base[at], source[at], mixed[at]).value)
    assert found.error == pytest.approx(np.std(drawn), rel=0.15)
    assert found.between(2.0) == (found.value - 2 * found.error, found.value + 2 * found.error)


def test_patterns_name_components_and_what_names_none_is_refused(model: GPT) -> None:
    assert matching(["a1.h*", "m0"], model.config) == ("m0", "a1.h0", "a1.h1")
    for wrong, told in (
        ("discover", "is no component"),
        ("a7.h0", "no component"),
        ("a0.h0<q>", "is no comp"),
    ):
        with pytest.raises(UsageError, match=told):
            matching([wrong], model.config)


def test_twins_of_other_lengths_and_decisions_without_number_are_refused(model: GPT) -> None:
    with pytest.raises(UsageError, match="row 1.*one length"):
        exchanged(model, [[1, 2], [1, 2]], [[1, 3], [1, 2, 3]], Two(), [()])
    with pytest.raises(VerificationError, match="decide alike"):
        share(np.ones(5), np.ones(5), np.ones(5))
    broken = GPT(model.config).init_weights(0).eval()
    with torch.no_grad():
        broken.embed.weight[3] = float("nan")
    with pytest.raises(VerificationError, match="NaN"):
        exchanged(broken, [[1, 2, 3]], [[1, 4, 3]], Two(), [()])
