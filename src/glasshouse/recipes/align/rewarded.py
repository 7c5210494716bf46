"""The reward model: trained on the judge's preferences in a run of its own, and refused when at chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasshouse.align.calibration import Calibration, calibrate, refuse_if_chance
from glasshouse.align.preferences import Preference, load_preferences, pair_batches, preference_plan, split
from glasshouse.align.revise import job_rows
from glasshouse.align.reward import RewardModel, RewardTrainee, load_reward
from glasshouse.align.rl import OBJECTIVES
from glasshouse.base.atomic import write_json
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.recipes.align.turns import Turns
from glasshouse.recipes.align.work import Work
from glasshouse.train import (
    Checkpoint,
    Decision,
    GateRecord,
    Settings,
    Stage,
    enter_run,
    environment,
    run_stages,
)
from glasshouse.train.checkpoint import from_ledger
from glasshouse.train.fold import position
from glasshouse.train.gate import Action

NAME = "reward"


class CalibrationGate:
    """The gate of a reward model's run: promoted when better than chance on held-out prompts, else held."""

    def __init__(self, held_out: Sequence[Preference]):
        self.held_out = held_out

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        """Calibrate and decide."""
        report = calibrate(load_reward(checkpoint), self.held_out)
        said = f"accuracy on held-out pairs {report.accuracy}"
        verdict: dict[str, Any] = {"constraint": "better-than-chance", "estimate": report.accuracy.value}
        above = report.accuracy.low > 0.5
        action: Action = ("promote" if final else "continue") if above else "hold"
        return Decision(action, said, verdicts=(verdict | {"status": "pass" if above else "fail"},))


def train_reward(work: Work, name: str = NAME, rows: str = "preferences.jsonl") -> None:
    """Train a reward model on a file of preferences and write its calibration. Safe to repeat.

    `RewardAtChance` when its accuracy on held-out prompts does not exclude a coin's.
    """
    report = work.home / f"{name}-calibration.json"
    if work.phase(name) is None:
        work.progress.note(f"training the {name} model")
        model = work.after(work.supervised)
        learn, held_out = preferences_of(work, work.turns(model), work.home / rows)
        run = RunFolder(work.run.path / name)
        _run(work, run, learn, held_out)
        found = calibrate(load_reward(head(run)), held_out)
        write_json(report, found.rows())
        work.close(name, [report, run.ledger], accuracy=_score(found), ece=found.ece, log_loss=found.log_loss)
        refuse_if_chance(found)
        return
    model = work.after(work.supervised)
    _, held_out = preferences_of(work, work.turns(model), work.home / rows)
    refuse_if_chance(calibrate(load_reward(head(RunFolder(work.run.path / name))), held_out))


def preferences_of(work: Work, turns: Turns, path: Path) -> tuple[list[Preference], list[Preference]]:
    """(to learn from, held out) by whole prompts, without rows too long for the context."""
    room = work.context(turns.engine.model)
    rows = [
        row
        for row in load_preferences(path, turns)
        if len(row.prompt) + max(len(row.chosen), len(row.rejected)) <= room
    ]
    learn, held_out = split(rows, work.align.reward.held_out, work.recipe.seed)
    if not learn or not held_out:
        raise DataError(f"{path}: {len(rows)} rows are too few to train on some prompts and test on others")
    return learn, held_out


def _run(work: Work, run: RunFolder, learn: list[Preference], held_out: list[Preference]) -> None:
    config = work.align.reward.stage
    shards = {"preferences": learn}
    batches = pair_batches(shards, config.batch_size, work.recipe.seed)
    stage = Stage(config, batches, preference_plan(shards))
    run.create()
    began = run.begun(resume=True)
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        settings = {**work.settings, "compile": "off"}
        enter_run(
            ledger,
            recipe_digest=digest_of([work.recipe.digest(), run.path.name, dict(stage.plan.digests)]),
            environment=environment(
                *(settings[k] for k in ("threads", "dtype", "muon_dtype", "compile", "device"))
            ),
            body={"name": run.path.name, "seed": work.recipe.seed},
            resume=began,
        )
        run_stages(
            lambda: RewardModel(work.after(work.supervised)),
            [stage],
            run=run,
            ledger=ledger,
            gate=CalibrationGate(held_out),
            seed=work.recipe.seed,
            settings=Settings(**settings, resume_command=work.command),
            resume=began,
            progress=work.progress,
            objectives=OBJECTIVES,
            trainee=RewardTrainee(),
        )


def head(run: RunFolder) -> Checkpoint:
    """The last checkpoint of a finished run."""
    at = position(Ledger(run.ledger, signing_key()).entries())
    return from_ledger(run, at.at_head.body)


def trained_reward(work: Work, turns: Turns, name: str = NAME) -> RewardModel:
    """The reward model, standardised on the supervised model's own answers: mean 0, deviation 1."""
    model = load_reward(head(RunFolder(work.run.path / name))).to(work.settings["device"])
    rows = [r for r in job_rows(work.home / "answers.jsonl") if r["state"] == "ok"]
    pairs = [(turns.prompt(r["prompt"]), turns.answer(r["text"])) for r in rows]
    pairs = [(p, a) for p, a in pairs if len(p) + len(a) < model.config.context]
    model.standardise([p for p, _ in pairs], [a for _, a in pairs])
    return model


def _score(found: Calibration) -> list[float]:
    return [found.accuracy.value, found.accuracy.low, found.accuracy.high]
