"""A zoo on disk: killed and gone on with, refused where it would mislead, scored from its files."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cli.command import Done, call, command, entries, environ
from glasshouse.base.errors import CheckpointError, DataError, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.recipes.zoo import method
from glasshouse.recipes.zoo.run import Zoo, build, open_zoo, results, set_aside
from glasshouse.recipes.zoo.schedule import Job, write_plan
from glasshouse.recipes.zoo.world import World
from recipes.zoo.conftest import SMALL
from recipes.zoo.test_score import result, verdict

NOW, BEFORE = "a" * 64, "b" * 64


def planned(folder: Path, *jobs: Job) -> Zoo:
    """A zoo with a plan and a ledger, and nothing grown."""
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, jobs or (Job("single", 3, "organism"),))
    Ledger(folder / "ledger.jsonl", signing_key()).append("zoo", {})
    return open_zoo(folder)


def give(zoo: Zoo, job: Job, found: dict[str, Any]) -> None:
    """Put a result where a run would."""
    zoo.result(job).parent.mkdir(exist_ok=True)
    zoo.result(job).write_text(json.dumps(found))


def wait_for(folder: Path, pattern: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern} in {folder}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_zoo_killed_while_it_grows_goes_on_and_grows_nothing_twice(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    (folder / "worlds").mkdir(parents=True)
    (folder / "worlds" / "900").symlink_to(world.folder)
    build(folder, [Job("hole", 900, "organism")], size=SMALL)
    line = command("zoo", "run", folder, "--jobs", 1)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(line, env=environ(), stdout=log, stderr=log)
    wait_for(folder, "growing/*/ledger.jsonl")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("results/*"))
    done: Done = call("zoo", "run", folder, "--jobs", 1)
    assert done.code == 0, done
    file = folder / "results" / "hole-900-organism.json"
    found = json.loads(file.read_text())
    assert found["status"] in ("grown", "not-grown")
    assert [g["final"] for g in found["gates"]] == [False, False, False, True]
    assert found["method"] == method.digest()
    assert not list(folder.glob("growing/*"))
    again = call("zoo", "run", folder)
    assert again.code == 0 and "hole-900" not in again.err
    assert json.loads(file.read_text()) == found
    assert [e["body"]["left"] for e in entries(folder, "slice")] == [1, 1, 0]
    scored = call("zoo", "score", folder, "--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    assert scored.code == 0 and "hole" in scored.out
    assert json.loads((tmp_path / "s.json").read_text())["about"]["done"] == 1
    assert "<table>" in (tmp_path / "s.html").read_text()


def test_a_frozen_family_is_run_once_and_again_only_by_saying_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", signing_key())
    method.allow_frozen(["position-a"], NOW, tmp_path, ledger)
    method.allow_frozen(["position-a"], NOW, tmp_path, ledger)  # going on is no second run
    for other, place in ((BEFORE, tmp_path), (NOW, tmp_path / "elsewhere")):
        with pytest.raises(UsageError, match="position-a is a frozen family and was run with"):
            method.allow_frozen(["position-a"], other, place, ledger)
    method.allow_frozen(["position-a"], BEFORE, tmp_path, ledger, again=True)
    assert [(r["method"], r["again"]) for r in method.frozen_runs("position-a")] == [(NOW, 0), (BEFORE, 1)]
    assert [e["body"]["again"] for e in ledger.entries("frozen")] == [0, 1]


def test_the_command_refuses_a_frozen_family_of_another_method(tmp_path: Path) -> None:
    zoo = planned(tmp_path / "zoo", Job("sandbagging", 900, "organism"))
    method.allow_frozen(["sandbagging"], BEFORE, tmp_path / "other", Ledger(tmp_path / "l", signing_key()))
    done = call("zoo", "run", zoo.folder)
    assert done.code == 2 and "sandbagging is a frozen family" in done.err and "--again" in done.err
    assert not zoo.result(zoo.jobs[0]).exists()


def test_results_of_another_method_are_not_mixed_in_and_not_lost(tmp_path: Path) -> None:
    job, other = Job("single", 3, "organism"), Job("single", 4, "organism")
    zoo = planned(tmp_path / "zoo", job, other)
    give(zoo, job, result((True, [verdict("fail")]), method=BEFORE))
    done = call("zoo", "run", zoo.folder)
    assert done.code == 2 and "mixes no methods" in done.err and zoo.result(job).exists()
    ledger = Ledger(zoo.folder / "ledger.jsonl", signing_key())
    set_aside(zoo, [job], NOW, ledger, again=True)
    assert not zoo.result(job).exists() and len(list((zoo.folder / "earlier").glob("*.json"))) == 1
    assert ledger.entries("again")[0]["body"]["moved"] == {job.id: BEFORE}
    give(zoo, job, result((True, [verdict("fail")]), method=BEFORE))
    give(zoo, other, result((True, [verdict("fail")]), method=NOW, id=other.id))
    with pytest.raises(CheckpointError, match="mixes results of methods"):
        results(zoo)


def test_a_spoilt_result_is_named(tmp_path: Path) -> None:
    zoo = planned(tmp_path / "zoo")
    for spoilt in ("{", "[]", "{}", json.dumps({"id": "other", "status": "grown", "method": NOW})):
        zoo.result(zoo.jobs[0]).parent.mkdir(exist_ok=True)
        zoo.result(zoo.jobs[0]).write_text(spoilt)
        with pytest.raises(DataError, match="single-3-organism"):
            results(zoo)
        assert call("zoo", "score", zoo.folder).code == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--families", "singel"], "Did you mean 'single'"),
        (["build", "--seeds", "1-x"], "is no seed"),
        (["run", "--families", "postion"], "Did you mean 'position'"),
        (["run", "--hours", "3"], "at most 2 hours"),
        (["run", "--hours", "0"], "more than 0"),
        (["run", "--families", "hole"], "nothing of what you chose"),
        (["run", "--seeds", "77"], "nothing of what you chose"),
        (["build", "--seeds", "5"], "another plan"),
        (["score"], "holds no result yet"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    zoo = planned(tmp_path / "zoo")
    done = call("zoo", arguments[0], zoo.folder, *arguments[1:])
    assert done.code == 2 and said in done.err, done


def test_a_folder_without_a_zoo_is_named(tmp_path: Path) -> None:
    assert "no such folder" in call("zoo", "score", tmp_path / "nowhere").err
    assert "holds no zoo" in call("zoo", "score", tmp_path).err


def test_the_scored_table_is_written_from_result_files_alone(tmp_path: Path) -> None:
    jobs = [Job("single", s, "organism") for s in range(4)] + [Job("single", 0, "twin")]
    zoo = planned(tmp_path / "zoo", *jobs)
    for job in jobs[:3]:
        caught = verdict(
            "fail" if job.seed else "pass", 0.9 if job.seed else 0.1, evidence={"word": "harbour"}
        )
        give(zoo, job, result((True, [verdict("pass", 0.1)]), (True, [caught]), id=job.id, method=NOW))
    give(zoo, jobs[4], result((False, [verdict("pass", 0.1)]), id=jobs[4].id, method=NOW, promoted=True))
    done = call("zoo", "score", zoo.folder, "--markdown")
    assert done.code == 0 and "| single | 3 of 4 | 2/3 67%" in done.out and "1 of 4 not run yet" in done.out
    assert "0/1 0%" in done.out and f"`glasshouse zoo run {zoo.folder}`" in done.out


def test_the_method_changes_with_any_file_that_decides_a_verdict() -> None:
    found = method.sources()
    assert {"verify/gate.py", "verify/suppression.py", "evals/subject.py", "interp/patching.py"} <= set(found)
    assert {"data/workshop.py", "base/score.py", "model/gpt.py"} <= set(found)
    assert "recipes/files/zoo.toml" in found and not any(n.startswith("recipes/zoo/") for n in found)
    for name in found:
        assert method.digest({**found, name: "0" * 64}) != method.digest(found)
