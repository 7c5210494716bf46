"""The loop trains any module whose `Trainee` says how: here a line through points, with files of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glasshouse.base.errors import Interrupted, TrainingError, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.train import (
    Checkpoint,
    Decision,
    Loss,
    Outcome,
    Settings,
    Stage,
    StageConfig,
    run_stages,
)
from glasshouse.train import checkpoint as saving
from glasshouse.train.optim import Group, Optimizers

PLAN = DataPlan(phases=(Phase(from_step=0, weights={"points": 1.0}),), digests={"points": "0" * 64})
SLOPES = torch.tensor([2.0, -1.0, 0.5])


class Lines(nn.Module):
    """Two lines that have nothing to do with each other, and a counter that is part of the state."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3))
        self.second = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


class LinesTrainee:
    """Adam for each line; the second line's weights are kept below one after every update."""

    def prepare(self, model: Lines, dtype: str, compile: str) -> None: ...

    def batch(self, batch: Any, model: Lines, where: str) -> Any:
        return batch

    def groups(self, model: Lines, config: StageConfig) -> list[Group]:
        return [
            Group(n, "adamw", config.adam_lr, 0.0, ((n, p),), clipped_with=n)
            for n, p in model.named_parameters()
        ]

    def after_backward(self, model: Lines) -> None: ...

    @torch.no_grad()
    def after_update(self, model: Lines, optimizers: Optimizers, batch: Any, loss: Loss, step: int) -> None:
        model.second.clamp_(max=1.0)
        model.seen += len(batch.x)

    def look(self, model: Lines) -> None:
        return None

    def need(self, model: Lines, objective: Any, batch: Any, dtype: str) -> None:
        return None

    def numbers(self, loss: Loss) -> dict[str, Any]:
        return {"error": loss.metrics["error"]}

    def write(self, model: Lines, folder: Path) -> None:
        saving.write_tensors(folder / "lines.safetensors", saving.weights(model))

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Lines) -> Lines:
        saving.weights_into(model, contents["lines.safetensors"], str(checkpoint.path))
        return model


class Points:
    """Points on both lines: a pure function of the step. ``spoilt``: steps whose points are NaN."""

    def __init__(self, step: int, spoilt: tuple[int, ...] = ()):
        self.x = torch.from_numpy(generator("points", step).normal(size=(16, 3)).astype(np.float32))
        if step in spoilt:
            self.x[:] = torch.nan
        self.shards = ("points",)


def fit(model: Lines, batch: Points) -> Loss:
    first = (batch.x @ (model.first - SLOPES)).square().mean()
    second = 100 * (batch.x @ (model.second - SLOPES)).square().mean()
    return Loss(first + second, {"first": first, "second": second}, {"error": float(first.detach())})


def train(folder: Path, resume: bool = False, spoilt: tuple[int, ...] = (), **changes: Any) -> Outcome:
    shape = {"steps": 40, "batch_size": 16, "adam_lr": 0.2, "save_every": 5, "log_every": 4}
    config = StageConfig(
        name="lines", objective="dictionary", monitor_every=3, **(shape | changes.pop("stage", {}))
    )
    run = RunFolder(folder).create()
    arguments = {
        "objectives": {"dictionary": fit},
        "trainee": LinesTrainee(),
        "settings": Settings(),
    } | changes
    stage = Stage(config, lambda step, _: Points(step, spoilt), PLAN)
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        if not len(ledger):
            ledger.append("run", {"recipe": "lines", "environment": {}})
        return run_stages(Lines, [stage], run=run, ledger=ledger, resume=resume, **arguments)


def files(outcome: Outcome) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in outcome.checkpoint.path.iterdir()}


def test_a_module_that_is_no_gpt_trains_and_is_saved_in_files_of_its_own(tmp_path: Path) -> None:
    outcome = train(tmp_path / "run")
    stored = saving.read_tensors(files(outcome)["lines.safetensors"], "lines")
    assert torch.allclose(stored["first"], SLOPES, atol=0.15)
    assert stored["second"].max() <= 1.0 and int(stored["seen"]) == 40 * 16
    assert "model.safetensors" not in files(outcome) and "config.json" not in files(outcome)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"error", "loss", "loss/first", "lr", "grad_norm"} <= rows[0].keys() and "bpb" not in rows[0]


@pytest.mark.parametrize("at", [1, 7, 20])
def test_interrupted_anywhere_and_resumed_it_ends_in_the_same_bits(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")

    class Stops(LinesTrainee):
        def after_update(self, *arguments: Any) -> None:
            super().after_update(*arguments)
            if arguments[-1] == at:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(tmp_path / "broken", trainee=Stops())
    resumed = train(tmp_path / "broken", resume=True)
    assert files(resumed) == files(whole)


def test_gradients_of_modules_side_by_side_are_clipped_apart() -> None:
    model = Lines()
    config = StageConfig(name="lines", steps=1, batch_size=16, clip_norm=1.0)
    optimizers = Optimizers(model, config, groups=LinesTrainee().groups(model, config))
    model.first.grad, model.second.grad = torch.full((3,), 0.1), torch.full((3,), 1e3)
    optimizers.clip()
    assert torch.equal(model.first.grad, torch.full((3,), 0.1))
    assert model.second.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_an_update_that_is_not_finite_reaches_neither_weights_nor_counters(tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", spoilt=(6, 7))
    stored = saving.read_tensors(files(outcome)["lines.safetensors"], "lines")
    assert int(stored["seen"]) == 38 * 16 and torch.isfinite(stored["first"]).all()
    with pytest.raises(TrainingError, match="in a row were not finite"):
        train(tmp_path / "worse", spoilt=(6, 7, 8))


def test_a_gate_judges_its_checkpoints(tmp_path: Path) -> None:
    def gate(checkpoint: Checkpoint, history: Any, final: bool) -> Decision:
        stored = saving.read_tensors(saving.read_checked(checkpoint)["lines.safetensors"], "lines")
        good = bool((stored["first"] - SLOPES).abs().max() < 0.2)
        return Decision(("promote" if good else "hold") if final else "continue", f"close: {good}")

    assert train(tmp_path / "run", gate=gate, stage={"gate_every": 8}).promoted
    assert not train(tmp_path / "short", gate=gate, stage={"steps": 2}).promoted


def test_an_objective_that_nobody_supplied_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="objective 'dictionary' is none of next_token, sft"):
        train(tmp_path / "run", objectives=None)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
