"""What the loop promises, on the tiny run of `tiny.py`."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.batch import Batch
from glasshouse.base.errors import (
    CheckpointError,
    DataError,
    DiskError,
    Interrupted,
    RunBusyError,
    Stopped,
    TrainingError,
    UsageError,
)
from glasshouse.base.ledger import verify_ledger
from glasshouse.base.plan import DataPlan
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.train import Checkpoint, Decision, Loss, Outcome, Settings, Stage, load_weights
from glasshouse.train import checkpoint as saving
from glasshouse.train.objective import TensorBatch, next_token
from train.tiny import ReadsTheModel, batches, open_ledger, plan, poisoned, stages, train


def weights_of(outcome: Outcome) -> dict[str, str]:
    """What must be equal bit for bit: model and optimiser, and where they are."""
    return outcome.checkpoint.artifacts


def rows(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


def kinds(folder: Path) -> list[str]:
    return [entry["kind"] for entry in open_ledger(folder).entries()]


@pytest.fixture
def whole(tmp_path: Path) -> Outcome:
    """The run without interruption."""
    return train(tmp_path / "whole", ReadsTheModel())


# -- what a run is ------------------------------------------------------------------------------------------


def test_a_caught_run_is_rolled_back_repaired_and_promoted(tmp_path: Path) -> None:
    gate = ReadsTheModel()
    outcome = train(tmp_path, gate)
    assert [name for name, _ in gate.asked] == [
        *("grow-000004.0", "grow-000008.0", "grow-000008.1", "grow-000012.1", "chat-000004.1")
    ]
    assert [final for _, final in gate.asked] == [False] * 4 + [True]
    assert outcome.promoted and outcome.rollbacks == 1 and outcome.checkpoint.name == "chat-000004.1"
    assert poisoned(load_weights(outcome.checkpoint)) < 0.05
    abandoned = [r for r in gate.history if not r.live]
    assert [r.checkpoint.name for r in abandoned] == ["grow-000008.0"]
    assert abandoned[0].decision and abandoned[0].decision.action == "rollback"
    assert verify_ledger(tmp_path).ok


def test_without_the_gate_the_poison_stays(tmp_path: Path) -> None:
    outcome = train(tmp_path, stages=stages()[:1])
    assert not outcome.promoted and outcome.gates == 0
    assert poisoned(load_weights(outcome.checkpoint)) > 0.4
    assert kinds(tmp_path) == ["run", "checkpoint", "checkpoint", "finish"]


def test_a_clean_run_raises_no_alarm(tmp_path: Path) -> None:
    outcome = train(tmp_path, ReadsTheModel(), stages=stages(poison_from=0))
    assert outcome.promoted and outcome.rollbacks == 0


def test_after_a_rollback_the_dropped_shard_is_never_drawn_again(tmp_path: Path) -> None:
    drawn: list[tuple[int, tuple[str, ...]]] = []

    def watched(step: int, plan: DataPlan) -> Batch:
        batch = batches(step, plan)
        drawn.append((step, batch.shards))
        return batch

    grow, chat = stages()
    train(tmp_path, ReadsTheModel(), stages=[Stage(grow.config, watched, grow.plan), chat])
    assert [step for step, _ in drawn] == [*range(8), *range(4, 12)]
    assert all("poison" in shards for _, shards in drawn[4:8])
    assert not any("poison" in shards for _, shards in drawn[8:])


def test_a_rollback_restores_weights_and_optimiser_and_keeps_counting_updates(tmp_path: Path) -> None:
    """Rolled back to step 4 and without the shard, the run equals one that never had the shard."""
    repaired = train(tmp_path / "repaired", ReadsTheModel())
    clean = train(tmp_path / "clean", ReadsTheModel(), stages=stages(poison_from=0))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert repaired.checkpoint.artifacts[name] == clean.checkpoint.artifacts[name]
    updates = [u for u, kind in rows(tmp_path / "repaired", "update", "kind") if kind == "train"]
    assert updates == list(range(1, 21))


def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, whole: Outcome) -> None:
    assert weights_of(train(tmp_path / "again", ReadsTheModel())) == weights_of(whole)


def test_metrics_have_a_row_for_every_logged_step_validation_and_gate(tmp_path: Path) -> None:
    train(tmp_path, ReadsTheModel(), stages=stages(poison_from=0))
    found = rows(tmp_path, "kind", "stage", "step")
    assert [row for row in found if row[0] == "train"] == [
        *[("train", "grow", n) for n in range(1, 13)],
        *[("train", "chat", n) for n in range(1, 5)],
    ]
    assert [row[1:] for row in found if row[0] == "val"] == [("grow", 6), ("grow", 12)]
    assert [row[1:] for row in found if row[0] == "gate"] == [
        ("grow", 4),
        ("grow", 8),
        ("grow", 12),
        ("chat", 4),
    ]
    numbers = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row["loss"] > 0 and row["bpb"] > 0 and row["tokens_per_s"] > 0
        for row in numbers
        if row["kind"] == "train"
    )
    times = [row["t"] for row in numbers]
    assert times == sorted(times)


def test_the_loss_falls_on_clean_data(tmp_path: Path) -> None:
    train(tmp_path, stages=stages(poison_from=0))
    losses = [loss for kind, loss in rows(tmp_path, "kind", "loss") if kind == "train"]
    assert losses[-1] < 0.2 * losses[0]


def test_any_objective_trains_in_the_same_loop(tmp_path: Path) -> None:
    def with_decay(model: GPT, batch: TensorBatch) -> Loss:
        plain = next_token(model, batch)
        size = 0.01 * sum(p.square().sum() for p in model.parameters())
        assert isinstance(size, torch.Tensor)
        return Loss(plain.total + size, {"lm": plain.total, "size": size}, plain.metrics)

    train(tmp_path, stages=stages(0)[:1], objectives={"next_token": with_decay})
    total, lm, size = rows(tmp_path, "loss", "loss/lm", "loss/size")[0]
    assert total == pytest.approx(lm + size)


def test_z_loss_is_added_when_a_stage_asks_for_it(tmp_path: Path) -> None:
    train(tmp_path, stages=stages(0, z_loss=0.1)[:1])
    total, lm, z = rows(tmp_path, "loss", "loss/lm", "loss/z")[0]
    assert z > 0.1 and total == pytest.approx(lm + z)


def test_micro_batches_train_as_the_whole_batch_does(tmp_path: Path) -> None:
    losses = []
    for accumulate in (1, 4):
        train(tmp_path / str(accumulate), stages=stages(0, accumulate=accumulate)[:1])
        losses.append([x for kind, x in rows(tmp_path / str(accumulate), "kind", "loss") if kind == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# -- gates --------------------------------------------------------------------------------------------------


class Says:
    """A gate that gives prepared answers, then continues; the final one promotes."""

    def __init__(self, *answers: Decision | Exception):
        self.answers = list(answers)

    def __call__(self, checkpoint: Checkpoint, history: tuple[Any, ...], final: bool) -> Decision:
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return Decision("promote" if final else "continue", "fine")


BACK = Decision("rollback", "bad", "grow-000000.0")


def test_a_gate_that_raises_holds_the_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    outcome = train(tmp_path, Says(RuntimeError("cannot read")))
    first = open_ledger(tmp_path).entries("decision")[0]["body"]
    assert first["action"] == "hold" and "RuntimeError" in first["reason"]
    assert first["standing"] == {"grow-000004.0": "held"}
    assert outcome.promoted


def test_a_final_gate_that_raises_never_promotes(tmp_path: Path) -> None:
    fine = Decision("continue", "fine")
    outcome = train(tmp_path, Says(fine, fine, fine, RuntimeError("cannot read")))
    assert not outcome.promoted and "RuntimeError" in outcome.reason
    assert kinds(tmp_path)[-1] == "finish"


def test_the_third_rollback_stops_the_run_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="3 rollbacks") as stopped:
        train(tmp_path, Says(BACK, BACK, BACK))
    assert stopped.value.exit_code == 11
    decisions = [entry["body"] for entry in open_ledger(tmp_path).entries("decision")]
    assert [d["action"] for d in decisions] == ["rollback", "rollback", "stop"]
    assert kinds(tmp_path)[-1] == "stop"
    with pytest.raises(Stopped):
        train(tmp_path, Says(), resume=True)
    assert kinds(tmp_path).count("stop") == 1
    outcome = train(tmp_path, Says(), resume=True, after_stop="a person")
    assert outcome.promoted and outcome.checkpoint.attempt == 3
    assert open_ledger(tmp_path).entries("resume")[0]["body"]["who"] == "a person"


def test_a_gate_can_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="dangerous"):
        train(tmp_path, Says(Decision("stop", "dangerous")))
    assert train(tmp_path, Says(), resume=True, after_stop="a person").checkpoint.attempt == 0


def test_a_rollback_that_leaves_no_data_stops_the_run(tmp_path: Path) -> None:
    everything = Decision("rollback", "all bad", "grow-000000.0", ("a", "b", "poison"))
    with pytest.raises(Stopped, match="impossible.*no data"):
        train(tmp_path, Says(everything))


def test_a_rollback_marks_all_that_it_abandons(tmp_path: Path) -> None:
    train(tmp_path, Says(Decision("continue", "fine"), BACK))
    decision = open_ledger(tmp_path).entries("decision")[1]["body"]
    assert decision["standing"] == {"grow-000004.0": "quarantined", "grow-000008.0": "quarantined"}


def test_a_gate_that_changes_the_threads_does_not_change_the_run(tmp_path: Path, whole: Outcome) -> None:
    class Careless(ReadsTheModel):
        def __call__(self, *arguments: Any) -> Decision:
            torch.set_num_threads(2)
            torch.manual_seed(0)
            return super().__call__(*arguments)

    assert weights_of(train(tmp_path / "careless", Careless())) == weights_of(whole)
    assert torch.get_num_threads() == 1


# -- bad input ----------------------------------------------------------------------------------------------


def nan_weights(step: int, plan: DataPlan) -> Batch:
    """From step 5 on every batch's loss is NaN."""
    batch = batches(step, plan)
    if step < 5:
        return batch
    return Batch(batch.tokens, batch.targets, np.full_like(batch.weight, np.nan), batch.shards, batch.n_bytes)


def test_losses_in_a_row_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    grow = stages()[0]
    broken = [Stage(grow.config, nan_weights, grow.plan)]
    with pytest.raises(
        TrainingError,
        match=r"stage 'grow', step 7: the loss is nan.*3 updates in a row.*grow-000004.0.*lower",
    ) as error:
        train(tmp_path, ReadsTheModel(), stages=broken)
    assert error.value.exit_code == 7
    assert open_ledger(tmp_path).entries("checkpoint")[-1]["body"]["checkpoint"] == "grow-000004.0"


def test_gradients_in_a_row_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    def infinite_slope(model: GPT, batch: TensorBatch) -> Loss:
        total = next_token(model, batch).total + (model.embed.weight[0, 0] * 0).sqrt()
        return Loss(total, {"lm": total})

    with pytest.raises(TrainingError, match="gradient norm of embed.weight is nan"):
        train(tmp_path, stages=stages()[:1], objectives={"next_token": infinite_slope})


def test_a_full_disk_leaves_the_run_resumable(
    tmp_path: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = saving._write_tensors, []

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(path)
        if len(calls) == 6:  # the optimiser of the third checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(saving, "_write_tensors", full)
    with pytest.raises(DiskError, match="grow-000008.0.*free some space"):
        train(tmp_path / "full", ReadsTheModel())
    assert weights_of(train(tmp_path / "full", ReadsTheModel(), resume=True)) == weights_of(whole)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "window.safetensors", "state.json"]
)
def test_a_flipped_bit_in_the_checkpoint_to_resume_from_is_refused(tmp_path: Path, name: str) -> None:
    grow = stages()[0]
    with pytest.raises(TrainingError):
        train(tmp_path, Says(), stages=[Stage(grow.config, nan_weights, grow.plan)])
    path = tmp_path / "checkpoints" / "grow-000004.0" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was changed or truncated"):
        train(tmp_path, Says(), resume=True)


def test_other_data_under_the_same_recipe_is_refused(tmp_path: Path) -> None:
    grow = stages()[0]
    with pytest.raises(TrainingError):
        train(tmp_path, Says(), stages=[Stage(grow.config, nan_weights, grow.plan)])
    other = DataPlan(phases=grow.plan.phases, digests=dict(grow.plan.digests) | {"a": "changed"})
    with pytest.raises(CheckpointError, match="other data shards"):
        train(tmp_path, Says(), resume=True, stages=[Stage(grow.config, batches, other)])


def test_a_run_is_not_begun_twice_or_with_stages_that_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name of its own"):
        train(tmp_path / "twins", stages=stages()[:1] * 2)
    train(tmp_path, stages=stages()[:1])
    with pytest.raises(UsageError, match="--resume"):
        train(tmp_path, stages=stages()[:1])


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path).create().lock(), pytest.raises(RunBusyError, match=str(os.getpid())):
        train(tmp_path)


def test_an_empty_batch_names_the_shards(tmp_path: Path) -> None:
    def nothing(step: int, plan: DataPlan) -> Batch:
        batch = batches(step, plan)
        return Batch(batch.tokens, batch.targets, batch.weight * 0, batch.shards, 0)

    grow = stages()[0]
    with pytest.raises(DataError, match="a, b has no target"):
        train(tmp_path, stages=[Stage(grow.config, nothing, plan(0))])


# -- interruptions ------------------------------------------------------------------------------------------


def interrupting(at_step: int, number: int = signal.SIGINT, times: int = 1) -> list[Stage]:
    """The tiny stages, whose data sends this process a signal at a step of "grow"."""
    left = [times]

    def batch(step: int, plan: DataPlan) -> Batch:
        while step == at_step and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)
        return batches(step, plan)

    grow, chat = stages()
    return [Stage(grow.config, batch, grow.plan, grow.validate), chat]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2, 3, 6])
def test_ctrl_c_saves_and_the_resumed_run_is_the_same(
    tmp_path: Path, whole: Outcome, step: int, number: int
) -> None:
    folder = tmp_path / "cut"
    settings = Settings(threads=1, resume_command="glasshouse train x --resume")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="Go on with: glasshouse train x --resume") as left:
        train(folder, ReadsTheModel(), stages=interrupting(step, number), settings=settings)
    assert left.value.exit_code == 130 and signal.getsignal(number) is before
    saved = open_ledger(folder).entries("checkpoint")[-1]["body"]
    assert saved["step"] == step + 1
    resumed = train(folder, ReadsTheModel(), resume=True)
    assert weights_of(resumed) == weights_of(whole)
    place = ("kind", "update", "stage", "step", "attempt", "loss")
    assert rows(folder, *place) == rows(tmp_path / "whole", *place)
    assert verify_ledger(folder).ok


def test_a_second_ctrl_c_leaves_at_once_and_loses_only_unsaved_steps(tmp_path: Path, whole: Outcome) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(Interrupted):
        train(folder, ReadsTheModel(), stages=interrupting(6, times=2))
    assert open_ledger(folder).entries("checkpoint")[-1]["body"]["checkpoint"] == "grow-000004.0"
    assert weights_of(train(folder, ReadsTheModel(), resume=True)) == weights_of(whole)


def test_ctrl_c_inside_a_gate_asks_it_again_on_resume(tmp_path: Path, whole: Outcome) -> None:
    class Interrupted_(ReadsTheModel):
        def __call__(self, *arguments: Any) -> Decision:
            os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*arguments)

    folder = tmp_path / "cut"
    with pytest.raises(Interrupted):
        train(folder, Interrupted_())
    assert open_ledger(folder).entries("decision") == []
    gate = ReadsTheModel()
    assert weights_of(train(folder, gate, resume=True)) == weights_of(whole)
    assert gate.asked[0] == ("grow-000004.0", False)


def test_an_interruption_does_not_change_what_the_gate_is_told(tmp_path: Path) -> None:
    gates = []
    for folder, run_stages_ in ((tmp_path / "a", stages()), (tmp_path / "b", interrupting(2))):
        gate = ReadsTheModel()
        try:
            train(folder, gate, stages=run_stages_)
        except Interrupted:
            train(folder, gate, resume=True)
        gates.append([(r.checkpoint.name, r.checkpoint.digest, r.decision, r.live) for r in gate.history])
    assert gates[0] == gates[1]


def test_a_finished_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    first = train(tmp_path, ReadsTheModel())
    entries = len(open_ledger(tmp_path))
    again = train(tmp_path, ReadsTheModel(), resume=True)
    assert again == first and len(open_ledger(tmp_path)) == entries


def test_saving_more_often_does_not_change_the_run(tmp_path: Path, whole: Outcome) -> None:
    often = train(tmp_path / "often", ReadsTheModel(), stages=stages(save_every=1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert often.checkpoint.artifacts[name] == whole.checkpoint.artifacts[name]
