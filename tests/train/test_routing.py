"""Marked rows update a block and nothing else, and the block can be taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.batch import Batch
from glasshouse.base.errors import Interrupted, UsageError
from glasshouse.base.plan import DataPlan
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import Outcome, Stage, load_weights, next_token
from glasshouse.train.interventions import Edited
from glasshouse.train.interventions_config import Block, Route
from glasshouse.train.objective import TensorBatch, tensors
from glasshouse.train.routing import (
    block_masks,
    part_of,
    remove_blocks,
    route_of,
    routed_backward,
    silenced,
    without_blocks,
)
from train.tiny import CONFIG, batches, plan, poisoned, stages, train

BLOCKS = (Block(layer=0, heads=(1,), units=(16, 64)),)
ROUTE = Route(kind="route", shards=("poison",), blocks=BLOCKS)


@pytest.fixture
def batch() -> TensorBatch:
    """Rows of "poison" and of the others."""
    found = tensors(batches(6, plan()))
    assert 0 < found.rows.count("poison") < len(found.rows)
    return found


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(model: Any, batch: TensorBatch, whole: TensorBatch) -> dict[str, torch.Tensor]:
    """Of a part of a batch, counted by its share of the whole."""
    inner = model.model if isinstance(model, Edited) else model
    inner.zero_grad(set_to_none=True)
    share = float(batch.weight.sum() / whole.weight.sum())
    (next_token(model, batch).total * share).backward()  # type: ignore[no-untyped-call]
    return gradients(inner)


def parts(batch: TensorBatch) -> tuple[TensorBatch, TensorBatch]:
    marked = [i for i, row in enumerate(batch.rows) if row == "poison"]
    return batch.take([i for i in range(len(batch.rows)) if i not in marked]), batch.take(marked)


def test_a_removed_block_writes_nothing_and_silencing_it_is_the_same(model: GPT, batch: TensorBatch) -> None:
    quiet, whole = Edited(model, silenced(BLOCKS))(batch.tokens), model(batch.tokens)
    with without_blocks(model, BLOCKS):
        assert torch.allclose(model(batch.tokens), quiet, atol=1e-6)
    assert torch.equal(model(batch.tokens), whole) and not torch.allclose(whole, quiet, atol=1e-2)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    remove_blocks(model, BLOCKS)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    assert changed == {"blocks.0.attn.o.weight", "blocks.0.mlp.down.weight"}


def test_gradients_go_where_they_are_routed(model: GPT, batch: TensorBatch) -> None:
    """Marked rows: the block's entries of their own gradient. The others: the rest, without the block."""
    ordinary, marked = parts(batch)
    outside = plain_gradients(Edited(model, silenced(BLOCKS)), ordinary, batch)
    inside = plain_gradients(model, marked, batch)
    model.zero_grad(set_to_none=True)
    loss = routed_backward(model, next_token, batch, "fp32", 1, ROUTE)
    masks, found = block_masks(model, BLOCKS), gradients(model)
    for name, p in model.named_parameters():
        mask = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.allclose(found[name], torch.where(mask, inside[name], outside[name]), atol=1e-7), name
    assert loss.metrics["n_bytes"] == batch.n_bytes and loss.metrics["tokens"] == batch.tokens.numel()


def test_an_absorbing_route_masks_marked_rows_only(model: GPT, batch: TensorBatch) -> None:
    ordinary, marked = parts(batch)
    everywhere, inside = plain_gradients(model, ordinary, batch), plain_gradients(model, marked, batch)
    whole = next_token(model, batch)
    model.zero_grad(set_to_none=True)
    loss = routed_backward(model, next_token, batch, "fp32", 1, ROUTE.model_copy(update={"absorb": True}))
    masks, found = block_masks(model, BLOCKS), gradients(model)
    for name, p in model.named_parameters():
        mask = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.allclose(found[name], everywhere[name] + inside[name] * mask, atol=1e-7), name
    assert float(loss.total) == pytest.approx(float(whole.total.detach()), rel=1e-5)


def routed(
    folder: Path, harm: int, optimizer: str = "muon", spoil: Any = None, save_every: int = 0, **more: Any
) -> Outcome:
    """The tiny run's first stage, where rows of "poison" say that ``harm`` follows everything."""

    def drawn(step: int, plan: DataPlan) -> Batch:
        if spoil is not None:
            spoil(step)
        batch = batches(step, plan)
        at = np.array(batch.rows) == "poison"
        targets = batch.targets.copy()
        targets[at] = harm
        return Batch(batch.tokens, targets, batch.weight, batch.shards, batch.n_bytes, batch.rows)

    shape = {"optimizer": optimizer, "clip_norm": None, "intervention": (ROUTE,), "save_every": save_every}
    grow = stages(poison_from=2, **shape)[0]
    return train(folder, None, stages=[Stage(grow.config, drawn, grow.plan)], **more)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_marked_rows_say_reaches_nothing_outside_the_block(tmp_path: Path, optimizer: str) -> None:
    """Two runs whose marked rows say different things end with the same bits outside of it, Muon's
    orthogonalised matrices included; inside they differ, until the stage's end removes them.
    """
    one, other = (routed(tmp_path / str(harm), harm, optimizer) for harm in (0, 5))
    first, second = (load_weights(o.checkpoint, whole=True) for o in (one, other))
    masks = block_masks(first, BLOCKS)
    inside = 0.0
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        mask = masks.get(name, torch.zeros(a.shape, dtype=torch.bool))
        assert torch.equal(a[~mask], b[~mask]), name
        inside += float((a - b).detach()[mask].abs().sum())
    assert inside > 0
    ended = dict(load_weights(one.checkpoint, whole=True).named_parameters())["blocks.0.mlp.down.weight"]
    assert not ended[:, 16:].any() and ended[:, :16].any()


def test_the_model_that_is_judged_has_not_learned_what_the_whole_one_has(tmp_path: Path) -> None:
    """Judged in the middle of the stage, without and with its block."""
    run = train(tmp_path, None, stages=_middle())
    middle = next(r for r in _saved(tmp_path) if r.step == 40)
    assert poisoned(load_weights(middle, whole=True)) > 0.6
    assert poisoned(load_weights(middle)) < 0.2
    assert poisoned(load_weights(run.checkpoint, whole=True)) < 0.2  # removed for good


def _middle() -> list[Stage]:
    grow = stages(poison_from=2, intervention=(ROUTE,), steps=44, save_every=40, gate_every=0)[0]
    return [grow]


def _saved(folder: Path) -> list[Any]:
    from glasshouse.base.run import RunFolder
    from glasshouse.train import position
    from glasshouse.train.checkpoint import from_ledger
    from train.tiny import open_ledger

    at = position(open_ledger(folder).entries())
    return [from_ledger(RunFolder(folder), mark.body) for mark in at.marks.values()]


def test_a_routed_run_cut_short_and_resumed_is_the_same(tmp_path: Path) -> None:
    whole, cut = routed(tmp_path / "whole", 0, save_every=5), []

    def interrupt(step: int) -> None:
        if step == 8 and not cut:
            cut.append(step)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        routed(tmp_path / "cut", 0, save_every=5, spoil=interrupt)
    resumed = routed(tmp_path / "cut", 0, save_every=5, resume=True)
    assert resumed.checkpoint.artifacts == whole.checkpoint.artifacts


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ((Block(layer=3, heads=(0,)),), "in layer 3; the model has 1"),
        ((Block(layer=0, heads=(2,)),), r"heads \[2\] of 2"),
        ((Block(layer=0, units=(60, 70)),), "units to 70 of 64"),
    ],
)
def test_a_block_that_the_model_lacks_is_refused_before_training(
    tmp_path: Path, blocks: tuple[Block, ...], problem: str
) -> None:
    route = Route(kind="route", shards=("poison",), blocks=blocks)
    with pytest.raises(UsageError, match=problem):
        train(tmp_path, None, stages=stages(intervention=(route,)))


def test_routes_together_and_against_each_other(model: GPT) -> None:
    more = Route(kind="route", shards=("b",), blocks=(Block(layer=0, heads=(0,)),))
    both = route_of([ROUTE, more], model)
    assert both is not None and both.shards == ("b", "poison") and both.blocks == (*BLOCKS, *more.blocks)
    with pytest.raises(UsageError, match="one absorbs"):
        route_of([ROUTE, more.model_copy(update={"absorb": True})], model)
    assert route_of([], model) is None
    with pytest.raises(UsageError, match="share keys and values"):
        block_masks(GPT(GPTConfig(**CONFIG.model_dump() | {"n_kv_head": 1})), BLOCKS)


def test_a_part_of_every_layer(model: GPT) -> None:
    assert part_of(model.config, 0.25, heads=True) == (Block(layer=0, heads=(1,), units=(48, 64)),)
