"""Spikes and values that are not finite: seen before the update, acted on as the stage says, and the same
after a kill.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.batch import Batch
from glasshouse.base.errors import CheckpointError, Stopped, TrainingError
from glasshouse.base.ledger import verify_ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.model import GPT
from glasshouse.train import Loss, Outcome, Stage, StageConfig, load_weights
from glasshouse.train.objective import Objective, TensorBatch, next_token
from glasshouse.train.stability import LEAST, WINDOW, Detector, Spike, broken
from train.tiny import ROWS, V, batches, new_model, open_ledger, plan, train

STEPS, BAD = 96, 80


def usual(n: int, seed: int = 0) -> list[tuple[float, list[float]]]:
    """Losses near 3 and norms spread by factors, as a run has them."""
    random = np.random.default_rng(seed)
    norms = np.exp(0.3 * random.normal(size=(n, 2)))
    return [(3 + 0.05 * z, x.tolist()) for z, x in zip(random.normal(size=n), norms, strict=True)]


def filled(n: int = WINDOW) -> Detector:
    detector = Detector(("a", "b"))
    assert [detector.look(*step) for step in usual(n)] == [None] * n
    return detector


# -- the detector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norms", "what"),
    [
        (4.0, [1.0, 1.0], "loss"),
        (3.0, [100.0, 100.0], "gradient norm"),
        (3.0, [1.0, 0.001], None),
        (2.0, [0.01, 0.01], None),  # far below the usual is no spike
        (math.nan, [], "loss"),
        (math.inf, [], "loss"),
        (3.0, [1.0, math.nan], "gradient norm of b"),
        (3.0, [math.inf, 1.0], "gradient norm of a"),
    ],
)
def test_what_is_out_of_the_ordinary_is_named(loss: float, norms: list[float], what: str | None) -> None:
    spike = filled().look(loss, norms)
    assert (spike.what if spike else None) == what


def test_one_tensor_out_of_line_is_seen_where_the_whole_gradient_hides_it() -> None:
    detector = Detector(("large", "small"))
    for _, (a, b) in usual(WINDOW):
        detector.look(3.0, [100 * a, 0.1 * b])
    spike = detector.look(3.0, [100.0, 20.0])
    assert spike is not None and spike.what == "gradient norm of small" and spike.limit is not None
    assert 0.1 < spike.limit < 20


def test_a_young_window_judges_only_what_is_not_finite() -> None:
    detector = filled(LEAST - 1)
    assert detector.look(1000.0, [1e6, 1e6]) is None
    spike = Detector(("a",)).look(math.nan, [])
    assert spike is not None and not spike.finite


def test_a_spike_in_the_window_does_not_hide_the_next() -> None:
    """With mean and standard deviation, one hundredfold gradient in the window makes 54 times usual."""
    detector = filled()
    for _ in range(8):
        assert detector.look(3.0, [100.0, 100.0]) is not None
    norms = np.array([math.hypot(*x) for _, x in usual(WINDOW)][8:] + [141.0] * 8)
    assert norms.mean() + 6 * norms.std() > 50.0  # what the plain rule would have let pass
    assert detector.look(3.0, [35.0, 35.0]) is not None


def test_a_level_that_stays_becomes_usual() -> None:
    detector = filled()
    seen = [detector.look(6 + 0.05 * z, [1.0, 1.0]) for z in np.random.default_rng(1).normal(size=WINDOW)]
    assert seen[0] is not None and seen[-1] is None


def test_a_trifle_is_no_spike_however_even_the_run_was() -> None:
    detector = Detector(("a",))
    for _ in range(WINDOW):
        detector.look(1.0, [1.0])
    assert detector.look(1.2, [3.0]) is None and detector.look(1.4, [1.0]) is not None


@given(st.integers(0, 400), st.integers(0, 20))
def test_a_restored_detector_sees_what_the_first_one_sees(cut: int, skips: int) -> None:
    steps = usual(cut + 40, seed=3)
    steps[-1] = (9.0, [1.0, 1.0])
    first = Detector(("a", "b"))
    for i, step in enumerate(steps[:cut]):
        first.look(*step)
        if i < skips:
            first.skip(Spike("loss", math.nan))
    second = Detector(("a", "b"))
    second.load({name: t.clone() for name, t in first.state().items()}, "x")
    for step in steps[cut:]:
        assert first.look(*step) == second.look(*step)
    assert first.too_many(3) == second.too_many(3) and first.in_a_row == second.in_a_row
    for name, tensor in first.state().items():
        assert torch.equal(tensor.nan_to_num(), second.state()[name].nan_to_num())


def test_a_window_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="another model"):
        Detector(("a",)).load(filled().state(), "here")


def test_a_broken_parameter_or_state_is_named() -> None:
    model = new_model()
    assert broken(model, {}) is None
    assert broken(model, {"embed.weight/exp_avg": torch.tensor([math.inf])}) is not None
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = math.nan
    assert broken(model, {}) == "parameter blocks.0.mlp.up.weight"


# -- what the loop does about it -----------------------------------------------------------------------------

GOOD = DataPlan(phases=(Phase(from_step=0, weights={"a": 1.0}),), digests={"a": "aaaa"})


def shuffled(batch: Batch, step: int) -> Batch:
    targets = generator("shuffled", step).integers(0, V, batch.targets.shape)
    return Batch(batch.tokens, targets.astype(np.int64), batch.weight, batch.shards, batch.n_bytes)


def not_a_number(batch: Batch, step: int) -> Batch:
    return Batch(
        batch.tokens, batch.targets, batch.weight * np.float32(math.nan), batch.shards, batch.n_bytes
    )


def feed(bad: Any = None, at: tuple[int, ...] = (BAD,)) -> Any:
    """The tiny run's batches, some of them spoilt."""

    def batch(step: int, plan: DataPlan) -> Batch:
        good = batches(step, plan)
        return bad(good, step) if bad is not None and step in at else good

    return batch


def steep(at: int) -> dict[str, Objective]:
    """An objective whose gradient is 100 times too large in one update."""
    calls = [0]

    def objective(model: GPT, batch: TensorBatch) -> Loss:
        loss = next_token(model, batch)
        if batch.tokens.shape[0] < ROWS:
            return loss  # memory is asked about
        calls[0] += 1
        factor = 100.0 if calls[0] == at + 1 else 1.0
        return Loss(
            loss.total.detach() + factor * (loss.total - loss.total.detach()), loss.parts, loss.metrics
        )

    return {"next_token": objective}


def stage(batch: Any, **changes: Any) -> list[Stage]:
    shape = {"name": "grow", "steps": STEPS, "batch_size": ROWS, "muon_lr": 0.01, "adam_lr": 0.004}
    config = StageConfig(**(shape | {"log_every": 1, "save_every": 24, "monitor_every": 0} | changes))
    return [Stage(config, batch, GOOD)]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def final_loss(outcome: Outcome) -> float:
    model = load_weights(outcome.checkpoint)
    batch = batches(10_000, GOOD)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens))
    return float(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("undisturbed"), stages=stage(feed()))


@pytest.mark.parametrize("bad", [shuffled, not_a_number])
def test_a_spoilt_batch_is_skipped_written_down_and_costs_nothing(
    tmp_path: Path, undisturbed: Outcome, bad: Any
) -> None:
    outcome = train(tmp_path, stages=stage(feed(bad)))
    (row,) = rows(tmp_path, "spike")
    assert (row["step"], row["what"], row["action"]) == (BAD + 1, "loss", "skip")
    entries = open_ledger(tmp_path).entries("checkpoint")
    found = [e["body"]["incidents"] for e in entries if "incidents" in e["body"]]
    assert [[i["step"] for i in incidents] for incidents in found] == [[BAD + 1]]
    assert found[0][0]["shards"] == ["a"]
    assert final_loss(outcome) < final_loss(undisturbed) + 0.02
    assert verify_ledger(tmp_path).ok


def test_a_hundredfold_gradient_is_skipped(tmp_path: Path) -> None:
    train(tmp_path, stages=stage(feed()), objectives=steep(BAD))
    (row,) = rows(tmp_path, "spike")
    assert (row["step"], row["action"]) == (BAD + 1, "skip") and row["what"].startswith("gradient norm")
    assert row["value"] > row["limit"] > 0


def test_a_skipped_update_changes_neither_weights_nor_optimiser(tmp_path: Path) -> None:
    train(tmp_path, stages=stage(feed(not_a_number), save_every=1))
    saved = {e["body"]["step"]: e["body"]["artifacts"] for e in open_ledger(tmp_path).entries("checkpoint")}

    def files(step: int) -> list[str]:
        names = ("model", "optimizer")
        return [saved[step][f"checkpoints/grow-{step:06d}.0/{name}.safetensors"] for name in names]

    assert files(BAD) == files(BAD + 1) != files(BAD + 2)


def test_log_applies_the_update_and_says_so(tmp_path: Path) -> None:
    train(tmp_path, stages=stage(feed(shuffled), on_spike="log"))
    row, *_ = rows(tmp_path, "spike")
    assert (row["step"], row["action"]) == (BAD + 1, "apply")


def test_log_never_applies_what_is_not_finite(tmp_path: Path) -> None:
    outcome = train(tmp_path, stages=stage(feed(not_a_number), on_spike="log"))
    (row,) = rows(tmp_path, "spike")
    assert row["action"] == "skip" and row["value"] == "nan"
    assert math.isfinite(final_loss(outcome))


def test_rewind_goes_back_and_leaves_out_the_batches_behind_the_spike(tmp_path: Path) -> None:
    asked: list[int] = []

    def watched(step: int, plan: DataPlan) -> Batch:
        asked.append(step)
        return feed(shuffled)(step, plan)

    outcome = train(tmp_path, stages=stage(watched, on_spike="rewind"))
    (entry,) = open_ledger(tmp_path).entries("spike")
    body = entry["body"]
    assert (body["action"], body["checkpoint"], body["left_out"]) == ("rewind", "grow-000072.0", [77, 80])
    assert asked == [*range(BAD + 1), *range(72, 77), *range(81, STEPS)]
    assert outcome.checkpoint.name == f"grow-{STEPS:06d}.1"
    updates = [row["update"] for row in rows(tmp_path, "train")]
    assert updates == sorted(set(updates))  # what was undone is not counted twice
    assert verify_ledger(tmp_path).ok


def test_too_many_rewinds_wait_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="3 rewinds stop a run"):
        train(tmp_path, stages=stage(feed(shuffled, tuple(range(BAD, STEPS))), on_spike="rewind"))
    assert [e["body"]["action"] for e in open_ledger(tmp_path).entries("spike")] == [
        "rewind",
        "rewind",
        "stop",
    ]


def test_stop_waits_for_a_person_who_lets_it_go_on_without_the_batch(tmp_path: Path) -> None:
    stages = stage(feed(shuffled), on_spike="stop")
    for _ in range(2):
        with pytest.raises(Stopped, match=f"step {BAD}: the loss is .* on a batch from a"):
            train(tmp_path, stages=stages, resume=True)
    outcome = train(tmp_path, stages=stages, resume=True, after_stop="a person")
    assert outcome.checkpoint.step == STEPS and len(open_ledger(tmp_path).entries("spike")) == 1


def test_a_run_that_skips_too_often_stops_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="more than 3 of the last 128 updates were skipped"):
        train(tmp_path, stages=stage(feed(shuffled, tuple(range(BAD, STEPS))), max_skips=3))


def test_new_data_are_not_called_a_spike(tmp_path: Path) -> None:
    """At step 80 the plan begins to draw from a shard that says something else."""
    outcome = train(tmp_path, stages=[Stage(stage(None)[0].config, batches, plan(BAD))])
    assert rows(tmp_path, "spike") == [] and outcome.checkpoint.step == STEPS


def breaking(at: int, **changes: Any) -> list[Stage]:
    """The stage, whose validation breaks a weight after step ``at``."""

    def validate(model: GPT) -> dict[str, Any]:
        with torch.no_grad():
            model.blocks[0].mlp.up.weight[0, 0] = math.nan
        return {"set": "held-out", "loss": 0.0}

    (one,) = stage(feed(), val_every=at, **changes)
    return [Stage(one.config, one.batches, one.plan, validate)]


def test_a_model_that_is_broken_ends_the_run_at_once(tmp_path: Path) -> None:
    """No batch is to blame, so none is skipped: the error names the parameter."""
    with pytest.raises(
        TrainingError, match=r"step 3: .*Parameter blocks.0.mlp.up.weight is not finite.*grow-000000.0"
    ):
        train(tmp_path, stages=breaking(3))


def test_a_checkpoint_with_a_value_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"blocks.0.mlp.up.weight is not finite; nothing was saved"):
        train(tmp_path, stages=breaking(6, save_every=6))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["grow-000000.0"]
