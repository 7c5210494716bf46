"""Training goes on while a gate judges, and nothing that is written down depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.batch import Batch
from glasshouse.base.errors import Interrupted, Stopped, UsageError
from glasshouse.base.ledger import verify_ledger
from glasshouse.base.plan import DataPlan
from glasshouse.train import Settings, Stage
from train import tiny
from train.gates import CannotBeMade, Densifies, Dies, Waits, signing
from train.tiny import AHEAD, ReadsTheModel, batches, end_of, stages, train

Run = Callable[..., int]


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that waits for every gate: two rollbacks are asked for, one data shard is dropped."""
    folder = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHOUSE_HOME", str(folder.parent / "home"))
        train(folder, ReadsTheModel())
    return folder


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [e["body"] for e in entries(folder) if e["kind"] == "decision"]


def order(folder: Path) -> list[tuple[str, str | None]]:
    return [(e["kind"], e["body"].get("checkpoint")) for e in entries(folder)]


def with_batches(drawn: Callable[[int, DataPlan], Batch]) -> list[Stage]:
    grow, chat = stages()
    return [Stage(grow.config, drawn, grow.plan, grow.validate), chat]


def test_every_verdict_and_every_bit_are_those_of_the_run_that_waits(tmp_path: Path, waited: Path) -> None:
    """The gate does not answer before training is well past the checkpoint, so that it has to go on."""
    sign = tmp_path / "sign"
    train(tmp_path / "run", Waits(sign), settings=AHEAD, stages=with_batches(signing(sign, 7)))
    assert sign.exists()
    assert [d["action"] for d in decisions(tmp_path / "run")].count("rollback") == 1
    assert end_of(tmp_path / "run") == end_of(waited)
    assert order(tmp_path / "run") == order(waited)
    assert verify_ledger(tmp_path / "run").ok


def test_a_worker_that_dies_has_judged_nothing_and_another_judges_on(tmp_path: Path) -> None:
    """At its second question the process is gone; promotion is asked here, where the gate lives on."""
    outcome = train(tmp_path, Dies(), settings=AHEAD, stages=stages(poison_from=0))
    said = decisions(tmp_path)
    assert [d["action"] for d in said] == ["continue", "hold", "continue", "promote"]
    assert "the process that judged grow-000008.0 died (exit status 3)" in said[1]["reason"]
    assert outcome.promoted


def test_a_gate_that_cannot_be_made_elsewhere_holds(tmp_path: Path) -> None:
    train(tmp_path, ReadsTheModel(), settings=AHEAD, stages=stages(poison_from=0), make_gate=CannotBeMade)
    said = decisions(tmp_path)
    assert [d["action"] for d in said] == ["hold", "hold", "hold", "promote"]
    assert "RuntimeError" in said[0]["reason"] and "no constraints here" in said[0]["reason"]


def test_densified_stages_are_gated_more_often_and_alike_whether_waited_for_or_not(tmp_path: Path) -> None:
    """What was trained past a gate that the decision asks for is thrown away."""
    train(tmp_path / "waits", Densifies(), stages=stages(poison_from=0))
    gated = [d["checkpoint"] for d in decisions(tmp_path / "waits")]
    assert gated == [
        *("grow-000004.0", "grow-000006.0", "grow-000008.0", "grow-000010.0", "grow-000012.0"),
        "chat-000004.0",
    ]
    train(tmp_path / "goes-on", Densifies(), stages=stages(poison_from=0), settings=AHEAD)
    assert end_of(tmp_path / "goes-on") == end_of(tmp_path / "waits")


def test_an_interrupted_run_asks_again_and_is_the_same(tmp_path: Path, waited: Path) -> None:
    drawn: list[int] = []

    def interrupting(step: int, plan: DataPlan) -> Batch:
        if step == 6 and 6 not in drawn:
            drawn.append(step)
            raise KeyboardInterrupt
        return batches(step, plan)

    with pytest.raises(Interrupted, match=r"up to grow-000004\.0 is saved"):
        train(tmp_path, ReadsTheModel(), settings=AHEAD, stages=with_batches(interrupting))
    train(tmp_path, ReadsTheModel(), settings=AHEAD, resume=True)
    assert end_of(tmp_path) == end_of(waited)


def test_an_error_of_work_that_a_rollback_throws_away_never_happened(tmp_path: Path, waited: Path) -> None:
    """Attempt 0 goes on past the failing gate at step 8 and meets a batch that cannot be trained on."""
    sign = tmp_path / "sign"

    def broken(step: int, plan: DataPlan) -> Batch:
        batch = batches(step, plan)
        if step == 9 and plan.at(step).weights.get("poison", 0) > 0:
            sign.touch()
            return replace(batch, tokens=batch.tokens + 99)
        return batch

    gate = Waits(sign, "grow-000008.0")
    train(tmp_path / "run", gate, settings=AHEAD, stages=with_batches(broken))
    assert sign.exists() and end_of(tmp_path / "run") == end_of(waited)


def test_a_stop_stops_though_training_went_on(tmp_path: Path) -> None:
    settings = Settings(threads=1, gates="async", max_rollbacks=1)
    with pytest.raises(Stopped, match="rollbacks were asked for"):
        train(tmp_path, ReadsTheModel(), settings=settings)
    assert order(tmp_path)[-1][0] == "stop"


def test_another_way_of_gating_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'sync' or 'async'"):
        train(tmp_path, ReadsTheModel(), settings=Settings(gates="later"))


@pytest.fixture(scope="module")
def run(glasshouse_home: Path) -> Iterator[Run]:
    """Runs the tiny run in a child that may be killed; returns its wait status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLASSHOUSE_HOME": str(glasshouse_home)}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(tiny.__file__).parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-W", "ignore", tiny.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as driver:
        assert driver.stdin and driver.stdout

        def once(folder: Path, **more: Any) -> int:
            assert driver.stdin and driver.stdout
            driver.stdin.write(
                json.dumps({"folder": str(folder), "ahead": True, "resume": False} | more) + "\n"
            )
            driver.stdin.flush()
            return int(json.loads(driver.stdout.readline()))

        yield once
        driver.stdin.close()


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "crash",
    ["step:6", "step:10", "gate.after:2", "decision.before-ledger:1", "decision.after-ledger:2"],
)
def test_killed_while_a_gate_judges_and_resumed_is_the_same_run(
    run: Run, waited: Path, tmp_path: Path, crash: str
) -> None:
    assert run(tmp_path / "run", crash=crash) == 9, f"{crash} was not reached"
    assert run(tmp_path / "run", resume=True) == 0
    assert end_of(tmp_path / "run") == end_of(waited)
    assert verify_ledger(tmp_path / "run").ok
