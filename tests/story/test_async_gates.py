"""A recipe whose gates judge while training goes on: the same verdicts, evidence and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.command import call, entries
from story.tiny import write_recipe


def without_times(value: Any) -> Any:
    """Everything but how long it took."""
    if isinstance(value, dict):
        times = ("seconds", "elapsed_s", "metrics_bytes")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def told(run: Path) -> tuple[Any, ...]:
    """What a run decided and why, and every verdict with its evidence."""
    decisions = [without_times(e["body"]) for e in entries(run, "decision")]
    for body in decisions:  # the files hold times, so their digests differ
        body["artifacts"] = sorted(body["artifacts"])
    files = sorted(run.glob("evals/gate-*/verdicts.json"))
    verdicts = [without_times(json.loads(f.read_text())) for f in files]
    checkpoints = [e["body"]["digest"] for e in entries(run, "checkpoint")]
    order = [e["kind"] for e in entries(run)]
    return decisions, verdicts, checkpoints, order, (run / "export" / "model.safetensors").read_bytes()


def test_gates_that_judge_while_training_goes_on_say_the_same(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for gates in ("sync", "async"):
        line = ["train", recipe, f"gates={gates}", "stage.sft.gate_every=2", "--run", tmp_path / gates]
        line.append(
            "constraint.complies-often.bound.at_least=0.2"
        )  # far from what is measured, in either run
        done = call(*line, "--quiet")
        assert done.code == 0, done
    assert told(tmp_path / "async") == told(tmp_path / "sync")
    assert [d["gate"] for d in told(tmp_path / "async")[0]] == [0, 1, 2, 3]
