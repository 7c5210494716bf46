"""The slow model that interventions are compared with is the model."""

from __future__ import annotations

import pytest
import torch

from interp.attribution import byhand


@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_the_equations_give_the_models_logits(shape: str) -> None:
    model, data = byhand.make(shape), byhand.contrast(3)
    with torch.no_grad():
        logits = model(data.clean)
    for i in range(3):
        assert torch.allclose(byhand.forward(model, data.clean[i])["logits"], logits[i], atol=2e-5)
