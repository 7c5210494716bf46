"""Document scores against exact gradients, one document at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glasshouse.base.errors import VerificationError
from glasshouse.interp import influence
from glasshouse.interp.influence import document_scores, readout_gradient
from glasshouse.model import GPT
from interp.dice import Difference, thrown

READ = Difference()
ROWS = [[1, 2, 3, 4], [7, 8, 9], [5, 5]]
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 24, size=int(n)).tolist() for n in RNG.integers(2, 16, size=24)]
MASKS = [(RNG.random(len(d)) < 0.6).astype(int).tolist() for d in DOCUMENTS]


def exact(model: GPT, direction: dict[str, torch.Tensor]) -> np.ndarray:
    """Dot product of every document's loss gradient with the direction, by autograd."""
    out = []
    for document, mask in zip(DOCUMENTS, MASKS, strict=True):
        tokens = torch.tensor([document])
        nats = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")
        loss = (nats * torch.tensor(mask[1:], dtype=nats.dtype)).sum()
        names = list(direction)
        grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], allow_unused=True)
        out.append(
            sum(float((g * direction[n]).sum()) for n, g in zip(names, grads, strict=True) if g is not None)
        )
    return np.array(out)


def off(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest error as a share of the scores' spread: what could change a ranking."""
    return float(np.abs(found - truth).max() / truth.std())


def test_the_gradient_is_the_read_outs_with_length_one() -> None:
    model = thrown()
    found = readout_gradient(model, ROWS, READ)
    model.zero_grad()
    torch.stack([READ.margin(model(torch.tensor([r]))[:, -1]).sum() for r in ROWS]).mean().backward()
    exact_ = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.sqrt(sum(g.square().sum() for g in exact_.values() if g is not None))
    assert sum(float(g.square().sum()) for g in found.values()) == pytest.approx(1.0, abs=1e-5)
    for name, g in found.items():
        assert torch.allclose(g, exact_[name] / norm, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_are_the_dot_products_of_gradients(dtype: torch.dtype) -> None:
    model = thrown(scale=0.15).to(dtype)
    direction = readout_gradient(model, ROWS, READ)
    found = document_scores(model, direction, DOCUMENTS, MASKS, rows=7)
    truth = exact(model, direction)
    assert off(found, truth) < 0.005
    assert (np.argsort(found)[-5:] == np.argsort(truth)[-5:]).all()


def test_the_step_is_chosen_between_curvature_and_rounding() -> None:
    model = thrown(scale=0.15)
    direction = readout_gradient(model, ROWS, READ)
    truth = exact(model, direction)
    error = {
        e: off(document_scores(model, direction, DOCUMENTS, MASKS, epsilon=e), truth)
        for e in (1e-5, 0.005, 0.05)
    }
    assert error[0.005] < 0.3 * min(error[1e-5], error[0.05])


def test_a_step_that_fits_a_document_of_positive_score_lowers_the_read_out() -> None:
    model = thrown(scale=0.15)
    scores = document_scores(model, readout_gradient(model, ROWS, READ), DOCUMENTS, MASKS)

    def margin() -> float:
        with torch.no_grad():
            return float(torch.stack([READ.margin(model(torch.tensor([r]))[:, -1]) for r in ROWS]).mean())

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for at in (int(np.argmax(scores)), int(np.argmin(scores))):
        start, tokens = margin(), torch.tensor([DOCUMENTS[at]])
        nats = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")
        model.zero_grad()
        (nats * torch.tensor(MASKS[at][1:])).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad
        assert np.sign(start - margin()) == np.sign(scores[at])
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n])


def test_padding_and_batching_do_not_change_a_score() -> None:
    model = thrown(scale=0.15)
    direction = readout_gradient(model, ROWS, READ)
    together = document_scores(model, direction, DOCUMENTS, MASKS)
    alone = [document_scores(model, direction, [d], [m])[0] for d, m in zip(DOCUMENTS, MASKS, strict=True)]
    assert together == pytest.approx(np.array(alone), abs=2e-3 * float(np.std(alone)))


def test_an_unmasked_document_scores_nought() -> None:
    model = thrown()
    direction = readout_gradient(model, ROWS, READ)
    assert document_scores(model, direction, [[1, 2, 3]], [[0, 0, 0]])[0] == 0.0


def test_parameters_are_bit_identical_afterwards_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = thrown()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    direction = readout_gradient(model, ROWS, READ)
    document_scores(model, direction, DOCUMENTS, MASKS)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    def moved_and_broken(*_: object) -> np.ndarray:
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        raise RuntimeError("broken half-way")

    monkeypatch.setattr(influence, "_losses", moved_and_broken)
    with pytest.raises(RuntimeError, match="broken half-way"):
        document_scores(model, direction, DOCUMENTS, MASKS)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_read_out_without_gradient_ranks_nothing() -> None:
    class Constant:
        def margin(self, logits: torch.Tensor) -> torch.Tensor:
            return logits[..., 0] * 0.0

    with pytest.raises(VerificationError, match="no gradient"):
        readout_gradient(thrown(), ROWS, Constant())
