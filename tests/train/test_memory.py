"""Out of memory: recognised, and answered with a setting that then does fit."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.batch import Batch
from glasshouse.base.errors import TrainingError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import Stage, StageConfig
from glasshouse.train import memory as room
from glasshouse.train.memory import (
    Need,
    advice,
    available_bytes,
    is_out_of_memory,
    kept_bytes,
    micro_batches,
    need,
)
from glasshouse.train.objective import TensorBatch, next_token, tensors
from glasshouse.train.update import Updater

WIDE = GPTConfig(vocab_size=256, context=256, d_model=128, n_layer=4, n_head=4)
PLAN = DataPlan(phases=(Phase(from_step=0, weights={"a": 1.0}),))
MIB = 2**20


def wide(step: int = 0, plan: DataPlan = PLAN, rows: int = 32) -> Batch:
    tokens = generator("wide", step).integers(0, 256, size=(rows, 256)).astype(np.int64)
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, dtype=np.float32), ("a",), rows * 256)


def updater(**changes: Any) -> Updater:
    config = StageConfig(**({"name": "grow", "steps": 4, "batch_size": 32, "monitor_every": 1} | changes))
    model = GPT(WIDE).init_weights(0)
    return Updater(model, Stage(config, wide, PLAN), next_token, "fp32", "fp32")


def test_every_way_to_say_out_of_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**59)
    assert is_out_of_memory(numpys.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_is_kept_for_the_backward_pass_is_counted_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert kept_bytes(lambda: (x * 2).exp().sum()) == 4000
    assert kept_bytes(lambda: ((y := (x * 2).exp()) * y).sum()) == 4000


@pytest.mark.parametrize("rows", [4, 16])
def test_the_need_of_many_rows_is_foretold_from_two(rows: int) -> None:
    model, batch = GPT(WIDE).init_weights(0), tensors(wide(rows=rows))
    counted = kept_bytes(lambda: next_token(model, batch).total)
    assert need(model, next_token, batch, "fp32").of(rows) == pytest.approx(counted, rel=0.05)


def test_counting_changes_nothing() -> None:
    model, batch = GPT(WIDE).init_weights(0), tensors(wide(rows=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    need(model, next_token, batch, "bf16")
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_the_fewest_micro_batches_that_fit_are_proposed() -> None:
    assert [micro_batches(24, rows) for rows in (24, 23, 12, 7, 1, 0)] == [1, 2, 2, 4, 24, None]
    said = advice(Need(0.0, 50 * MIB), "grow", 24, 1, 796 * MIB)
    assert "accumulate = 4 in stage 'grow' (4 micro-batches of 6 rows" in said and "batch_size = 6" in said
    assert "not even one row fits" in advice(Need(0.0, 100 * MIB), "grow", 24, 1, 120 * MIB)
    assert "accumulate = 4" in advice(Need(0.0, 1.0), "grow", 24, 2, 10**12)  # so many rows did not fit


def test_a_stage_that_cannot_fit_is_refused_before_linux_kills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda device: 200 * MIB)
    with pytest.raises(
        TrainingError, match=r"stage 'grow', step 0: memory ran out .* Set accumulate = \d+"
    ) as said:
        updater()(0, PLAN, None)
    fits = int(str(said.value).split("accumulate = ")[1].split()[0])
    assert updater(accumulate=fits)(0, PLAN, None).action == "apply"


def in_child(work: Callable[[], int]) -> int:
    """The exit status of ``work`` in a forked child, whose limits are its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def leave_room(n_bytes: int) -> list[torch.Tensor]:
    """Limit this process's address space to ``n_bytes`` more than it uses; what tests freed is taken."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    held = []
    for size in (MIB, MIB // 8):
        try:
            while True:
                held.append(torch.empty(size, dtype=torch.uint8))
        except RuntimeError:
            pass
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, resource.RLIM_INFINITY))
    return held


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_setting_that_it_names_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: the address space of a child ends 240 MiB above where it stands; 32 rows need 415."""
    updater(batch_size=2)(0, PLAN, None)  # what is loaded lazily is loaded
    monkeypatch.setattr(room, "HOPELESS", 0.0)  # do not foresee it: run into it

    said = tmp_path / "said"

    def train(accumulate: int) -> int:
        update = updater(accumulate=accumulate)
        held = leave_room(240 * MIB)
        try:
            done = [update(step, PLAN, None).action for step in range(2)]
        except TrainingError as error:
            said.write_text(str(error))
            return 1
        return 0 if done == ["apply"] * 2 and held else 2

    assert in_child(lambda: train(1)) == 1
    message = said.read_text()
    assert "memory ran out" in message and "micro-batches" in message
    fits = int(message.split("accumulate = ")[1].split()[0])
    assert fits < 32 and in_child(lambda: train(fits)) == 0, said.read_text()


def test_free_memory_is_known_on_linux() -> None:
    free = available_bytes()
    assert free is None or 0 < free < 2**50


def test_one_row_is_enough_to_ask() -> None:
    batch = tensors(wide(rows=1))
    only = TensorBatch(batch.tokens, batch.targets, batch.weight, 256, ("a",))
    assert need(GPT(WIDE), next_token, only, "fp32").of(1) > MIB
