"""A recipe of phases runs through to the end, under the gate, and goes on from wherever it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from glasshouse.align.calibration import RewardAtChance
from glasshouse.align.rows import read_rows
from glasshouse.base import crash
from glasshouse.base.errors import CheckpointError, RecipeError
from glasshouse.base.ledger import verify_ledger
from glasshouse.page.report import build_report
from glasshouse.recipes.align.run import align
from glasshouse.recipes.align.template import recipe_for
from glasshouse.recipes.schema import Recipe
from recipes.align_world import SMALL, entries, judge_at, small

POINTS = (
    *("step:10", "rows-after-append:9", "rows-before-append:100", "phase-revisions.before-ledger"),
    *("phase-revisions.after-ledger", "step:3", "rows-after-append:150", "phase-feedback.before-ledger"),
    *("phase-feedback.after-ledger", "step:50", "phase-reward.before-ledger", "phase-reward.after-ledger"),
    *("step:3", "finish.after-ledger"),
)


LATER = [
    *("stage.constitution.steps=2", "stage.constitution.batch_size=8", "stage.constitution.gate_every=2"),
    *("stage.rl.steps=2", "stage.rl.batch_size=8", "stage.rl.gate_every=2"),
]

FEWER = {"dpo": ["align.made.red_team=20", "align.made.helpful=20"]}  # no reward model to be above chance


class Killed(BaseException):
    """Where the process would have died."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A judge that likes short answers."""
    with judge_at() as (where, _):
        yield where


@pytest.fixture(scope="module")
def recipe(url: str) -> Recipe:
    return small(f'align.judge="{url}"', 'align.judge_model="rule"')


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run of all phases, never interrupted."""
    run = tmp_path_factory.mktemp("align") / "run"
    align(recipe, run)
    return run


def test_every_phase_is_in_one_run(finished: Path) -> None:
    assert [e["phase"] for e in entries(finished, "phase")] == ["revisions", "feedback", "reward"]
    stages = list(dict.fromkeys(e["stage"] for e in entries(finished, "checkpoint")))
    assert stages == ["pretrain", "midtrain", "helpful", "constitution", "rl"]
    assert [e["stage"] for e in entries(finished, "checkpoint") if e["last"]] == ["rl"]
    assert len(entries(finished, "finish")) == 1 and verify_ledger(finished).ok


def test_every_stage_of_a_phase_is_gated_and_a_violated_constraint_holds_the_promotion(
    finished: Path,
) -> None:
    decided = entries(finished, "decision")
    assert [d["checkpoint"].split("-0")[0] for d in decided] == ["helpful", "constitution", "rl", "rl"]
    assert decided[-1]["action"] in ("hold", "stop") and not (finished / "export").exists()
    assert any(v["constraint"] == "refuses-harm" for v in decided[-1]["verdicts"])


def test_the_reward_model_has_a_run_and_a_gate_of_its_own(finished: Path) -> None:
    (decided,) = entries(finished / "reward", "decision")
    (closed,) = [e for e in entries(finished, "phase") if e["phase"] == "reward"]
    assert decided["action"] == "promote" and closed["accuracy"][1] > 0.5
    assert verify_ledger(finished / "reward").ok


def test_rl_is_watched_by_a_score_that_it_never_learns_from(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text("utf-8").splitlines()]
    rl = [r for r in rows if r["kind"] == "rl"]
    assert [r["step"] for r in rl] == [1, 2, 3, 4]
    assert all({"reward", "kl", "gold", "gold_se", "evasive"} <= r.keys() for r in rl)


def test_answers_before_and_after_are_kept_for_the_report(finished: Path) -> None:
    samples = json.loads((finished / "evals" / "samples.json").read_text("utf-8"))
    assert [s["stage"] for s in samples[::4]] == ["helpful", "constitution", "rl"]
    measured = json.loads((finished / "evals" / "phases.json").read_text("utf-8"))["measured"]
    assert measured.keys() == {"helpful", "constitution", "rl"}


def test_the_report_shows_the_phases_and_the_answers_before_and_after(finished: Path) -> None:
    page = build_report(finished).decode("utf-8")
    for text in ("Critiques and revisions", "Reward model", "accuracy on held-out pairs", "helped rightly"):
        assert text in page
    of = page.split("Answers before and after", 1)[1]
    places = [of.index(f">{stage}<") for stage in ("helpful", "constitution", "rl")]
    assert places == sorted(places)  # as they were trained


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_another_method_goes_through_the_same_phases_from_a_run_of_ours(
    method: str, url: str, finished: Path, tmp_path: Path
) -> None:
    """The base is a checkpoint of the closed language, so no prompts are given."""
    helpful = next(e["checkpoint"] for e in entries(finished, "checkpoint") if e["stage"] == "constitution")
    known = {"model", "data", "tokenizer", "stage"}
    recipe, folder = recipe_for(
        finished / "checkpoints" / helpful,
        "workshop",
        judge=url,
        judge_model="rule",
        method=method,
        overrides=[c for c in SMALL if c.split(".")[0] not in known] + LATER + FEWER.get(method, []),
    )
    align(recipe, tmp_path / "run", folder=folder)
    stages = list(dict.fromkeys(e["stage"] for e in entries(tmp_path / "run", "checkpoint")))
    assert stages == ["constitution", "rl"] and verify_ledger(tmp_path / "run").ok
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    key = "explained_variance" if method == "ppo" else "accuracy"
    assert any(key in r for r in rows if r["kind"] == "rl")


def test_killed_anywhere_it_ends_with_the_same_rows_and_weights(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(crash.os, "kill", killed)
        for point in POINTS:
            crash._reached.clear()
            patch.setenv("GLASSHOUSE_CRASH_AT", point)
            with pytest.raises(Killed):
                align(recipe, run, resume=True)
    align(recipe, run, resume=True)
    for name in ("revisions", "helpful", "answers", "feedback"):
        there, here = (read_rows(r / "align" / f"{name}.jsonl") for r in (finished, run))
        assert [(r["key"], r.get("text")) for r in here] == [(r["key"], r.get("text")) for r in there], name
    mine, theirs = (entries(r, "checkpoint")[-1] for r in (run, finished))
    assert mine["digest"] == theirs["digest"]
    assert [e["phase"] for e in entries(run, "phase")] == ["revisions", "feedback", "reward"]


def test_a_finished_run_is_left_as_it_is(recipe: Recipe, finished: Path) -> None:
    before = (finished / "ledger.jsonl").read_bytes()
    align(recipe, finished, resume=True)
    assert (finished / "ledger.jsonl").read_bytes() == before


def test_a_file_of_a_phase_that_was_changed_afterwards_is_refused(recipe: Recipe, finished: Path) -> None:
    file = finished / "align" / "feedback.jsonl"
    was = file.read_bytes()
    file.write_bytes(was.replace(b'"ok"', b'"no"', 1))
    try:
        with pytest.raises(CheckpointError, match="feedback.jsonl is not what the phase 'feedback' left"):
            align(recipe, finished, resume=True)
    finally:
        file.write_bytes(was)


def test_a_run_goes_on_with_its_own_constitution_alone(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    shipped = (files("glasshouse.align") / "constitutions" / "workshop.toml").read_text("utf-8")
    (tmp_path / "workshop").write_text(shipped.replace("is not rude", "is rude"), "utf-8")
    with pytest.raises(RecipeError, match="constitution: not what the run was begun with"):
        align(recipe, finished, folder=tmp_path, resume=True)


def test_a_judge_of_noise_gives_a_reward_model_at_chance_and_rl_refuses_to_start(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    assert recipe.align is not None
    noisy = recipe.model_copy(update={"align": recipe.align.model_copy(update={"control": "random"})})
    with pytest.raises(RewardAtChance, match="RL does not start"):
        align(noisy, tmp_path / "run")
    with pytest.raises(RewardAtChance, match="RL does not start"):  # and again, with nothing made twice
        align(noisy, tmp_path / "run", resume=True)
    assert not entries(tmp_path / "run", "finish")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (['stage.rl.optimizer="muon"'], 'set optimizer = "adamw"'),
        (['stage.rl.shards=["chat-00"]'], "draws from shards"),
        (['stage.constitution.shards=["revised", "helpfull"]'], "Did you mean 'helpful'"),
        (['align.base="x"'], "is the first stage: remove pretrain"),
        (['align.control="shufled"'], "align.control"),
        (["align.revising.round=2"], "unknown key 'align.revising.round'"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_before_anything_is_run(changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        small(*changes)
