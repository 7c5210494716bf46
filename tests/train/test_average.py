"""The mean of a stage's last weights: right, exact on resume, and nothing at all unless asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError, Interrupted
from glasshouse.model import GPT
from glasshouse.train import StageConfig, load_weights
from glasshouse.train.average import TailAverage
from glasshouse.train.checkpoint import weights
from glasshouse.train.optim import Optimizers
from train.tiny import CONFIG, stages, train


def one(*values: float) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.tensor(values))}


def walk(average: TailAverage, p: nn.Parameter, values: list[float], first_step: int = 1) -> None:
    for step, value in enumerate(values, start=first_step):
        with torch.no_grad():
            p.fill_(value)
        average.update(step)


def test_the_stage_ends_with_the_mean_of_the_last_weights() -> None:
    parameters = one(0.0)
    walk(TailAverage(parameters, steps=5, share=0.6), parameters["w"], [100.0, 50.0, 1.0, 2.0, 6.0])
    assert parameters["w"].item() == pytest.approx(3.0)


def test_before_the_last_update_the_weights_themselves_go_on() -> None:
    parameters = one(0.0)
    average = TailAverage(parameters, steps=5, share=1.0)
    walk(average, parameters["w"], [1.0, 2.0, 3.0, 4.0])
    assert parameters["w"].item() == 4.0
    assert average.state_tensors()["w/average"].item() == pytest.approx(2.5)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_tail_of_none_or_one_update_changes_nothing(share: float) -> None:
    parameters = one(0.0)
    average = TailAverage(parameters, steps=5, share=share)
    walk(average, parameters["w"], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert parameters["w"].item() == 5.0
    assert average.state_tensors() == {}


def test_the_mean_goes_through_the_optimisers_state_and_back() -> None:
    config = StageConfig(name="s", steps=4, batch_size=1, average_share=1.0)
    made = []
    for _ in range(2):
        model = GPT(CONFIG).init_weights(0)
        made.append((model, Optimizers(model, config)))
    (model, saved), (other, loaded) = made
    step_once(model, saved)
    step_once(other, loaded)
    saved.average.update(1)
    loaded.load(saved.state_tensors(), "here")
    names = {n for n in saved.state_tensors() if n.endswith("/average")}
    assert names == {f"{name}/average" for name in weights(model)}
    assert all(torch.equal(loaded.state_tensors()[n], saved.state_tensors()[n]) for n in names)


def step_once(model: GPT, optimizers: Optimizers) -> None:
    model(torch.arange(8)[None]).square().mean().backward()
    optimizers.step(1.0)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"w/average": torch.zeros(2), "x/average": torch.zeros(2)}, "unknown parameter"),
        ({"w/average": torch.zeros(3)}, "shape"),
        ({"x/average": torch.zeros(2)}, "'w' is missing"),
    ],
)
def test_another_models_mean_is_refused(state: dict[str, Tensor], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        TailAverage(one(0.0, 0.0), 5, 1.0).load(state, "here")


def test_resuming_inside_the_tail_without_its_mean_is_refused() -> None:
    average = TailAverage(one(0.0), steps=5, share=1.0)
    with pytest.raises(CheckpointError, match="average_share"):
        average.update(3)


def test_a_run_interrupted_inside_the_tail_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    once = Once(at=9)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", interrupt=once)
    cut = run(tmp_path / "cut", resume=True)
    assert once.done
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    plain = run(tmp_path / "plain", average_share=0.0)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


class Once:
    """Ctrl-C, by an exception, when a step's batch is drawn for the first time."""

    def __init__(self, at: int):
        self.at, self.done = at, False

    def __call__(self, step: int) -> None:
        if step == self.at and not self.done:
            self.done = True
            raise KeyboardInterrupt


def run(
    folder: Path, interrupt: Once | None = None, resume: bool = False, **changes: Any
) -> dict[str, Tensor]:
    """A run of one stage that saves every four steps and averages over its last eight of twelve."""
    shape = {"gate_every": 0, "save_every": 4, "average_share": 0.66, **changes}
    stage = stages(0, **shape)[0]
    batches = stage.batches

    def drawn(step: int, plan: Any) -> Any:
        if interrupt is not None:
            interrupt(step)
        return batches(step, plan)

    outcome = train(folder, resume=resume, stages=[replace(stage, batches=drawn)])
    return weights(load_weights(outcome.checkpoint))
