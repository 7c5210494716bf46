from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.train import objective
from glasshouse.train.objective import bits_per_byte, evaluate, next_token, sft, tensors
from train.tiny import POS, ROWS, V, batches, new_model, plan


def batch(weight: np.ndarray | None = None) -> Batch:
    plain = batches(0, plan(0))
    return plain if weight is None else Batch(plain.tokens, plain.targets, weight, plain.shards, 10)


def test_loss_is_the_weighted_mean_of_torchs_cross_entropy() -> None:
    weight = np.random.default_rng(0).random((ROWS, POS), dtype=np.float32) * (np.arange(POS) % 3 > 0)
    model, data = new_model(), tensors(batch(weight.astype(np.float32)))
    nats = F.cross_entropy(model(data.tokens).flatten(0, 1), data.targets.flatten(), reduction="none")
    expected = (nats * data.weight.flatten()).sum() / data.weight.sum()
    loss = next_token(model, data)
    assert torch.allclose(loss.total, expected, atol=1e-6)
    assert math.isclose(loss.metrics["nats"], float(expected.detach() * data.weight.sum()), rel_tol=1e-5)


def test_gradient_is_that_of_the_whole_cross_entropy() -> None:
    model, data = new_model(), tensors(batch())
    p = list(model.parameters())
    nats = F.cross_entropy(model(data.tokens).flatten(0, 1), data.targets.flatten(), reduction="none")
    expected = torch.autograd.grad((nats * data.weight.flatten()).sum() / data.weight.sum(), p)
    got = torch.autograd.grad(next_token(model, data).total, p)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_z_loss_adds_the_mean_squared_log_normaliser_and_is_a_part() -> None:
    model, data = new_model(), tensors(batch())
    square = model(data.tokens).flatten(0, 1).logsumexp(-1).square().mean()
    plain, loss = next_token(model, data), next_token(model, data, z_loss=0.01)
    assert torch.allclose(loss.total, plain.total + 0.01 * square, atol=1e-5)
    assert torch.allclose(sum(loss.parts.values()), loss.total, atol=1e-5)
    assert torch.allclose(loss.parts["lm"], plain.total, atol=1e-6)


def test_sft_learns_nothing_from_what_has_no_weight() -> None:
    weight = np.zeros((ROWS, POS), dtype=np.float32)
    weight[:, -1] = 1
    model, changed = new_model(), batch(weight)
    before = sft(model, tensors(changed)).total
    changed.targets[:, :-1] = 3
    assert torch.equal(sft(model, tensors(changed)).total, before)


def test_a_batch_without_targets_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="a, b"):
        sft(new_model(), tensors(batch(np.zeros((ROWS, POS), dtype=np.float32))))


def test_a_uniform_model_needs_log2_of_the_vocabulary_in_bits_per_token() -> None:
    model = new_model()
    with torch.no_grad():
        model.head.weight.zero_()
    data = batch()
    found = evaluate(model, [data, data])
    assert found["loss"] == pytest.approx(math.log(V))
    # The tiny batch says that one target is one byte.
    assert found["bpb"] == pytest.approx(math.log2(V))
    assert found["targets"] == 2 * ROWS * (POS - 1)


def test_evaluation_weighs_targets_and_not_batches() -> None:
    few = np.zeros((ROWS, POS), dtype=np.float32)
    few[0, 1] = 1
    model, a, b = new_model(), batch(), batch(few)
    la, lb = (float(next_token(model, tensors(x)).total.detach()) for x in (a, b))
    n = ROWS * (POS - 1)
    assert evaluate(model, [a, b])["loss"] == pytest.approx((la * n + lb) / (n + 1), rel=1e-5)


def test_validating_on_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to validate on"):
        evaluate(new_model(), [])


def test_bits_per_byte_of_no_bytes_is_unknown() -> None:
    assert bits_per_byte(1.0, 0) is None


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        objective.autocast("fp16")
