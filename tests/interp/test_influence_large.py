"""Influence with curvature: the plain dot product where curvature is the identity; an error without it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.influence_large import curved_scores
from glasshouse.model import GPT, GPTConfig, gpt
from stirred import stirred


@dataclass(frozen=True)
class Two:
    """Logit of token 1 less that of token 2."""

    def margin(self, logits: Tensor) -> Tensor:
        return logits[..., 1].float() - logits[..., 2].float()


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run-time checks of the tests refuse the layers that kronfluence wraps."""
    monkeypatch.setattr(gpt, "project", inspect.unwrap(gpt.project))


@pytest.fixture
def model() -> GPT:
    config = GPTConfig(vocab_size=11, context=12, d_model=16, n_layer=2, n_head=2, activation="gelu")
    return stirred(GPT(config).init_weights(0).eval(), 1)


def data() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Read-out rows, documents of several lengths, and which of their tokens count."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(11, size=int(rng.integers(3, 8))).tolist() for _ in range(5)]
    documents = [rng.integers(11, size=int(rng.integers(4, 12))).tolist() for _ in range(24)]
    return rows, documents, [[0, 0, *([1] * (len(d) - 2))] for d in documents]


def test_without_the_extra_it_says_what_to_install(
    model: GPT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    monkeypatch.setitem(sys.modules, "kronfluence.analyzer", None)
    rows, documents, masks = data()
    with pytest.raises(UsageError, match=r"kronfluence.*glasshouse-lm\[influence\]"):
        curved_scores(model, rows, Two(), documents, masks, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_without_curvature_it_is_the_dot_product_of_gradients_and_the_model_stays_as_it_was(
    model: GPT, tmp_path: Path
) -> None:
    pytest.importorskip("kronfluence")
    rows, documents, masks = data()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = curved_scores(model, rows, Two(), documents, masks, tmp_path, strategy="identity", batch=5)
    weights = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])

    margin = torch.stack([Two().margin(model(torch.tensor([r]))[0, -1]) for r in rows]).mean()
    towards = gradient(margin)
    for i, (document, mask) in enumerate(zip(documents, masks, strict=True)):
        logits = model(torch.tensor([document]))[0, :-1]
        nats = nn.functional.cross_entropy(logits, torch.tensor(document[1:]), reduction="none")
        product = float(gradient((nats * torch.tensor(mask[1:])).sum()) @ towards)
        assert found[i] == pytest.approx(product, rel=1e-3, abs=1e-5)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_with_curvature_fitting_a_high_document_lowers_the_read_out(model: GPT, tmp_path: Path) -> None:
    pytest.importorskip("kronfluence")
    rows, documents, masks = data()
    found = curved_scores(model, rows, Two(), documents, masks, tmp_path, batch=8)
    assert np.isfinite(found).all() and found.std() > 0
    order, moved = np.argsort(found), []
    for i in (*order[:4], *order[-4:]):
        tried = GPT(model.config).eval()
        tried.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(tried.parameters(), lr=1e-3)
        for _ in range(5):
            logits = tried(torch.tensor([documents[i]]))[0, :-1]
            nats = nn.functional.cross_entropy(logits, torch.tensor(documents[i][1:]), reduction="none")
            optimizer.zero_grad()
            (nats * torch.tensor(masks[i][1:])).sum().backward()
            optimizer.step()
        with torch.no_grad():
            moved.append(float(np.mean([Two().margin(tried(torch.tensor([r]))[0, -1]) for r in rows])))
    assert np.mean(moved[:4]) > np.mean(moved[4:])  # least influential first
