"""Whatever ends a run, it goes on from where it was, or says which file is in the way."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.command import call, command, entries, environ, spawn, weights

Change = Callable[[str, Callable[[bytes], bytes]], Path]


def resume(folder: Path, *more: object) -> tuple[int, str]:
    done = call("train", folder / "tiny.toml", *more, "--run", folder / "run", "--resume", "--quiet")
    return done.code, done.err


def test_a_run_killed_with_signal_9_reaches_the_same_weights(half_done: Path, finished: Path) -> None:
    assert not entries(half_done / "run", "finish")
    assert resume(half_done) == (0, "")
    assert weights(half_done / "run") == weights(finished)


@pytest.mark.parametrize("point", ["data-manifest", "gate.after", "finish.after-ledger"])
def test_killed_while_preparing_in_a_gate_or_at_the_very_end(
    recipe: Path, finished: Path, tmp_path: Path, point: str
) -> None:
    line = ["train", recipe, "--run", tmp_path / "run", "--quiet"]
    assert spawn(*line, GLASSHOUSE_CRASH_AT=point).code == -signal.SIGKILL
    assert resume(tmp_path) == (0, "")
    assert weights(tmp_path / "run") == weights(finished)
    assert call("ledger", "verify", tmp_path / "run").code == 0


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", [flipped, lambda data: data[: len(data) // 2]], ids=["flipped", "truncated"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_loaded(
    half_done: Path, damaged: Change, name: str, how: Callable[[bytes], bytes]
) -> None:
    file = damaged(name, how)
    before = entries(half_done / "run")
    code, said = resume(half_done)
    assert code == 4
    assert str(file) in said and "changed or truncated" in said and "backup" in said
    assert entries(half_done / "run") == before


def test_a_checkpoint_that_is_gone_is_named(half_done: Path) -> None:
    shutil.rmtree(half_done / "run" / "checkpoints" / "pretrain-000004.0")
    code, said = resume(half_done)
    assert code == 4 and "pretrain-000004.0" in said


def test_a_changed_shard_is_named(half_done: Path) -> None:
    shard = half_done / "run" / "data" / "chat-00.bin"
    shard.write_bytes(flipped(shard.read_bytes()))
    code, said = resume(half_done)
    assert code == 3 and "chat-00.bin" in said


def test_a_changed_recipe_is_refused(half_done: Path) -> None:
    code, said = resume(half_done, "stage.sft.steps=9")
    assert code == 2 and "the recipe changed" in said


def test_a_full_disk_leaves_a_run_that_goes_on_when_there_is_room(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    first = finished / "checkpoints" / "pretrain-000000.0"
    trained = finished / "checkpoints" / "pretrain-000002.0" / "optimizer.safetensors"
    enough = max(f.stat().st_size for f in [*first.iterdir(), *(finished / "data").iterdir()])
    assert enough < trained.stat().st_size, "the limit must let the first checkpoint through, not the second"
    # A file may not grow beyond what the first checkpoint needs: to a program that is a full disk.
    limit = enough + 1
    done = subprocess.run(
        command("train", recipe, "--run", tmp_path / "run", "--quiet"),
        capture_output=True,
        text=True,
        env=environ(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 10, done
    assert "no space left" in done.stderr and "pretrain-000002.0" in done.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["pretrain-000000.0"]
    assert resume(tmp_path) == (0, "")
    assert weights(tmp_path / "run") == weights(finished)


def test_ctrl_c_saves_and_names_the_command_that_goes_on_and_nobody_else_may_write_meanwhile(
    recipe: Path, tmp_path: Path
) -> None:
    line = [
        "train",
        recipe,
        "stage.pretrain.steps=600",
        "stage.pretrain.save_every=0",
        "--run",
        tmp_path / "run",
    ]
    said = ""
    with subprocess.Popen(command(*line), stderr=subprocess.PIPE, text=True, env=environ()) as process:
        assert process.stderr is not None
        while "pretrain step 1/600" not in said:
            text = process.stderr.readline()
            assert text, said
            said += text
        busy = call(*line, "--resume")
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        assert process.wait() == 130, said
    assert busy.code == 6 and f"in use by process {process.pid}" in busy.err
    assert f"Go on with: glasshouse train {recipe}" in said and "--resume" in said.splitlines()[-1]
    last = entries(tmp_path / "run", "checkpoint")[-1]["body"]
    assert last["why"] == "interrupt" and 0 < last["step"] < 600
    assert (tmp_path / "run" / "report.html").is_file()
    assert call(*line, "--resume", "--quiet").code == 0


def test_ctrl_c_before_there_is_anything_to_keep_says_how_to_begin(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glasshouse.recipes.corpus.build", interrupt)
    done = call("train", recipe, "--run", tmp_path / "run", "--quiet")
    assert done.code == 130 and "glasshouse train" in done.err and "Traceback" not in done.err
