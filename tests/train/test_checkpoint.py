from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from glasshouse.base import atomic
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import CheckpointError, DiskError
from glasshouse.base.run import RunFolder
from glasshouse.train import checkpoint as saving
from glasshouse.train.config import StageConfig
from glasshouse.train.gate import Checkpoint
from glasshouse.train.optim import Optimizers
from train.test_optim import one_step
from train.tiny import new_model, plan

FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]
STAGE = StageConfig(name="grow", steps=10, batch_size=8)


def saved(folder: Path, name: str = "grow-000002.0") -> tuple[Checkpoint, Any, Optimizers]:
    tokenizer = folder / "tok.json"
    tokenizer.write_text("{}")
    model = new_model()
    optimizers = Optimizers(model, STAGE)
    for step in range(2):
        one_step(model, optimizers, step)
    place = {"stage": "grow", "stage_index": 0, "step": 2, "attempt": 0, "update": 2}
    body = {**place, "plan": plan().model_dump(mode="json")}
    run = RunFolder(folder / "run").create()
    artifacts = saving.write_checkpoint(run, name, model, optimizers, tokenizer, {**body, "seed": 0})
    return saving.from_ledger(run, {**body, "checkpoint": name, "artifacts": artifacts}), model, optimizers


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    checkpoint, model, optimizers = saved(tmp_path)
    other = new_model()
    restored = Optimizers(other, STAGE)
    state = saving.load_checkpoint(checkpoint, other, restored)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    ours, theirs = optimizers.state_tensors(), restored.state_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert state["step"] == 2 and state["plan"] == plan().model_dump(mode="json")
    assert checkpoint.plan == plan()


def test_a_checkpoint_can_be_read_without_knowing_its_model(tmp_path: Path) -> None:
    checkpoint, model, _ = saved(tmp_path)
    tokens = torch.arange(8)[None]
    assert torch.equal(saving.load_weights(checkpoint)(tokens), model(tokens))


def test_equal_states_have_equal_digests(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert saved(tmp_path / "a")[0].digest == saved(tmp_path / "b", "grow-000002.1")[0].digest


def test_no_file_is_a_pickle_and_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    checkpoint, _, _ = saved(tmp_path)
    assert sorted(p.name for p in checkpoint.path.iterdir()) == FILES
    for name in ("config.json", "state.json"):
        json.loads((checkpoint.path / name).read_text())
    stored = safetensors.torch.load_file(checkpoint.path / "model.safetensors")
    assert set(stored) == {name for name, _ in new_model().named_parameters()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_named_before_anything_is_loaded(
    tmp_path: Path, name: str, damage: str
) -> None:
    checkpoint, _, _ = saved(tmp_path)
    path = checkpoint.path / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    untouched = new_model()
    before = [p.clone() for p in untouched.parameters()]
    with pytest.raises(CheckpointError, match=f"{name} .*(expected SHA-256|cannot be read).*start a new run"):
        saving.load_checkpoint(checkpoint, untouched, None)
    assert all(torch.equal(a, b) for a, b in zip(before, untouched.parameters(), strict=True))


def rewritten(checkpoint: Checkpoint, change: Any) -> Checkpoint:
    """A checkpoint whose weights file was changed and whose ledger entry agrees with it."""
    path = checkpoint.path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    return Checkpoint(
        **{**vars(checkpoint), "artifacts": {**checkpoint.artifacts, path.name: sha256_file(path)}}
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("embed.weight"), "'embed.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is unknown"),
        (
            lambda t: t.update({"embed.weight": torch.zeros(2, 2)}),
            r"'embed.weight' is torch.float32 \[2, 2\]",
        ),
        (lambda t: t.update({"embed.weight": t["embed.weight"].double()}), "torch.float64"),
        (lambda t: t["embed.weight"].fill_(float("nan")), "'embed.weight' has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(tmp_path: Path, change: Any, problem: str) -> None:
    checkpoint, _, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match=problem):
        saving.load_weights(rewritten(checkpoint, change))


def test_a_file_that_is_no_safetensors_is_refused_even_if_ledgered(tmp_path: Path) -> None:
    checkpoint, _, _ = saved(tmp_path)
    path = checkpoint.path / "model.safetensors"
    path.write_bytes(b"\x80\x04.")
    ledgered = Checkpoint(
        **{**vars(checkpoint), "artifacts": {**checkpoint.artifacts, path.name: sha256_file(path)}}
    )
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        saving.load_weights(ledgered)


def test_another_recipes_model_or_optimiser_is_refused(tmp_path: Path) -> None:
    checkpoint, model, _ = saved(tmp_path)
    other = type(model)(model.config.model_copy(update={"d_mlp": 8}))
    with pytest.raises(CheckpointError, match="another model than the recipe's"):
        saving.load_weights(checkpoint, other)
    adamw = Optimizers(model, STAGE.model_copy(update={"optimizer": "adamw"}))
    with pytest.raises(CheckpointError, match="other optimiser groups"):
        saving.load_checkpoint(checkpoint, model, adamw)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "_write_tensors", full)
    with pytest.raises(DiskError, match="no space left while writing .*grow-000002.0"):
        saved(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_the_sweep_removes_only_what_a_killed_save_left(tmp_path: Path) -> None:
    checkpoint, _, _ = saved(tmp_path)
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / "grow-000004.0").mkdir()
    (run.checkpoints / "my notes").mkdir()
    (run.checkpoints / ".grow-000006.0.tmp-999999999-0123abcd").mkdir()
    assert atomic.TEMPORARY.match(".grow-000006.0.tmp-999999999-0123abcd")
    assert len(saving.sweep(run, {checkpoint.name: None})) == 2
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [checkpoint.name, "my notes"]
