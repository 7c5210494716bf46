"""Directions: what they are, and what removing or adding them does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glasshouse.base.errors import VerificationError
from glasshouse.interp.direction import difference_of_means, project_out, random_directions, steer
from glasshouse.model import Taps
from interp.dice import thrown


def unit(d: int = 6) -> torch.Tensor:
    x = torch.randn(d, generator=torch.Generator().manual_seed(1))
    return x / x.norm()


def test_difference_of_means_points_from_negative_to_positive_with_length_one() -> None:
    negative = torch.randn(50, 6)
    positive = negative + 3 * unit()
    assert torch.allclose(difference_of_means(positive, negative), unit(), atol=1e-5)


def test_classes_that_are_empty_or_equal_have_no_direction() -> None:
    x = torch.ones(3, 6)
    with pytest.raises(VerificationError, match="both classes"):
        difference_of_means(x[:0], x)
    with pytest.raises(VerificationError, match="same mean"):
        difference_of_means(x, x)
    with pytest.raises(VerificationError, match="no direction"):
        difference_of_means(x * torch.nan, x)


def test_projecting_out_leaves_nothing_along_the_direction_and_all_else_as_it_was() -> None:
    x, d = torch.randn(2, 5, 6), unit()
    y = project_out(d)(x)
    assert torch.allclose(y @ d, torch.zeros(2, 5), atol=1e-6)
    across = torch.eye(6) - torch.outer(d, d)
    assert torch.allclose(y @ across, x @ across, atol=1e-5)
    assert torch.allclose(project_out(d)(y), y, atol=1e-6)


def test_with_a_centre_the_component_becomes_the_centres() -> None:
    x, d, centre = torch.randn(2, 5, 6), unit(), torch.randn(6)
    y = project_out(d, centre)(x)
    assert torch.allclose(y @ d, (centre @ d).expand(2, 5), atol=1e-5)
    across = torch.eye(6) - torch.outer(d, d)
    assert torch.allclose(y @ across, x @ across, atol=1e-5)


def test_steering_adds_the_amount_along_the_direction() -> None:
    x, d = torch.randn(2, 5, 6), unit()
    assert torch.allclose((steer(d, 2.5)(x) - x) @ d, torch.full((2, 5), 2.5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_keep_the_dtype_of_what_they_edit(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 6).to(dtype)
    assert project_out(unit())(x).dtype == steer(unit(), 1.0)(x).dtype == dtype


def test_an_ablated_model_no_longer_holds_the_direction_at_any_site() -> None:
    model = thrown()
    d = random_directions(1, 16, np.random.default_rng(0))[0]
    sites = [f"blocks.{i}.resid_post" for i in range(3)]
    with Taps(read=sites, edit={s: project_out(d) for s in sites}) as taps:
        model(torch.tensor([[1, 2, 3]]), taps)
    for site in sites:
        assert (taps[site] @ d).abs().max() < 1e-5
        assert taps[site].norm() > 0.1


def test_random_directions_are_unit_even_and_repeatable() -> None:
    drawn = torch.stack(list(random_directions(400, 16, np.random.default_rng(3))))
    assert torch.allclose(drawn.norm(dim=1), torch.ones(400), atol=1e-5)
    assert drawn.mean(0).abs().max() < 0.05
    again = torch.stack(list(random_directions(400, 16, np.random.default_rng(3))))
    assert torch.equal(drawn, again)
