from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.model import GPT
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import Loss, TensorBatch, next_token, tensors
from glasshouse.train.step import backward, checked, pieces, plain
from stirred import stirred
from train.tiny import CONFIG, POS, ROWS, batches, new_model, plan


def ragged() -> TensorBatch:
    """A batch whose rows have very different numbers of targets, two of them none."""
    batch = tensors(batches(3, plan(0)))
    weight = torch.zeros_like(batch.weight)
    for row, n in enumerate([7, 5, 0, 0, 1, 2, 2, 7]):
        weight[row, :n] = 1.0
    weight[4] *= 0.25
    return TensorBatch(batch.tokens, batch.targets, weight, 25, batch.shards)


def with_size(model: GPT, batch: TensorBatch) -> Loss:
    """Something that is no mean over targets, beside something that is."""
    loss = next_token(model, batch)
    size = 0.01 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return Loss(loss.total + size, {**loss.parts, "size": size}, loss.metrics)


def moved() -> GPT:
    """The tiny model away from its start, where half of the gradients are zero."""
    return stirred(new_model(), 1, 0.1)


@pytest.mark.parametrize("objective", [next_token, with_size])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_have_the_gradient_of_the_whole_batch(accumulate: int, objective: object) -> None:
    whole, parts, batch = moved(), moved(), ragged()
    a = backward(whole, objective, batch, "fp32")  # type: ignore[arg-type]
    b = backward(parts, objective, batch, "fp32", accumulate)  # type: ignore[arg-type]
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.abs().max() > 0
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert float(b.total) == pytest.approx(float(a.total.detach()), rel=1e-6)
    assert {k: float(v) for k, v in b.parts.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in a.parts.items()}
    )
    counted = {k: v for k, v in a.metrics.items() if k != "tokens"}
    assert {k: b.metrics[k] for k in counted} == pytest.approx(counted)


def test_the_mean_of_the_micro_batches_means_would_be_another_gradient() -> None:
    """So that the test above can fail: pieces that all counted alike would not do."""
    shares = [share for _, share in pieces(ragged(), 4)]
    assert sum(shares) == pytest.approx(1.0) and len(shares) == 3 and max(shares) > 2 * min(shares)


def test_a_batch_that_does_not_divide_is_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(ValidationError, match=r"batch_size 8 does not divide into accumulate = 3"):
        StageConfig(name="s", steps=1, batch_size=8, accumulate=3)


def test_a_loss_that_is_not_finite_leaves_no_gradient_behind() -> None:
    model, batch = new_model(), ragged()
    batch.weight[7, 0] = torch.nan
    for accumulate in (1, 4):
        loss = backward(model, next_token, batch, "fp32", accumulate)
        assert not torch.isfinite(loss.total)
        if accumulate == 1:
            assert all(p.grad is None for p in model.parameters())


def numbers(tokens: np.ndarray) -> Batch:
    ones = np.ones(tokens.shape, dtype=np.float32)
    return Batch(tokens, tokens, ones, ("books",), int(tokens.size))


@pytest.mark.parametrize("token", [CONFIG.vocab_size, -1])
def test_a_token_that_the_model_does_not_know_names_the_tokenizer(token: int) -> None:
    tokens = np.zeros((ROWS, POS), dtype=np.int64)
    tokens[2, 3] = token
    with pytest.raises(
        DataError, match=rf"a batch from books holds token {token}.*0 to 15.*another tokenizer"
    ):
        checked(numbers(tokens), new_model(), "stage 's', step 0")


def test_rows_longer_than_the_context_name_both_lengths() -> None:
    with pytest.raises(DataError, match=r"rows of 9 tokens, but the model's context is 8.*model.context"):
        checked(numbers(np.zeros((2, POS + 1), dtype=np.int64)), new_model(), "stage 's', step 0")


def test_plain_puts_the_compiled_path_back() -> None:
    model = new_model()
    fast = model.run_block = lambda *arguments: arguments[1]  # type: ignore[assignment,misc]
    with pytest.raises(RuntimeError), plain(model):
        assert model.run_block is not fast
        raise RuntimeError
    assert model.run_block is fast
