"""The phases as one recipe: grow (or load) a model, revise, judge, reward, RL, in one run folder.

Every stage goes through the same loop with the same ledger, gate and metrics; what lies between two stages is
made once and ledgered. Killed anywhere, the same command goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from glasshouse.align.constitution import Constitution, load_constitution
from glasshouse.align.rl import OBJECTIVES
from glasshouse.base.atomic import write_json
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import Interrupted, RecipeError, Stopped, TrainingError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.data import books, word_types
from glasshouse.evals.chat import chat_format
from glasshouse.model import GPT
from glasshouse.recipes import corpus
from glasshouse.recipes import run as running
from glasshouse.recipes.align import policy, supervised
from glasshouse.recipes.align.aftermath import tell
from glasshouse.recipes.align.base import Base, open_base
from glasshouse.recipes.align.gate import gate_for
from glasshouse.recipes.align.judged import write_preferences
from glasshouse.recipes.align.material import HelperBatches, build
from glasshouse.recipes.align.rewarded import train_reward
from glasshouse.recipes.align.work import Work
from glasshouse.recipes.schema import Recipe
from glasshouse.train import Outcome, Progress, Settings, Stage, position, run_stages
from glasshouse.train.trainee import LANGUAGE, Trainee


def align(
    recipe: Recipe,
    path: Path,
    *,
    folder: Path = Path(),
    resume: bool = False,
    allow_change: bool = False,
    after_stop: str | None = None,
    progress: Progress | None = None,
    command: str = "glasshouse train",
) -> Outcome:
    """Run a recipe with `[align]` in the run folder ``path``; arguments as `recipes.run.train`.

    Raises what that raises; what engines and judges raise (`EngineDown`, `BudgetSpent`, `JudgeBiased`,
    `JudgeUnreadable`); `RewardAtChance`; `KLBlowUp`. What was made before is kept, and ``resume`` goes on.
    """
    run, progress = RunFolder(path), progress or Progress()
    began = run.begun(resume)
    assert recipe.align is not None
    constitution = load_constitution(
        recipe.align.constitution
        if not (folder / recipe.align.constitution).is_file()
        else folder / recipe.align.constitution
    )
    base = open_base(recipe.align, folder) if recipe.based else None
    with run.lock():
        try:
            phases = _Phases(recipe, constitution, run, folder, base, progress, command, began)
            phases.enter(allow_change, after_stop)
            return phases.to_the_end()
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what was made is kept. Go on with: {command}") from None


class _Phases:
    """The phases in order; which are done is asked of the ledger, every time."""

    def __init__(
        self,
        recipe: Recipe,
        constitution: Constitution,
        run: RunFolder,
        folder: Path,
        base: Base | None,
        progress: Progress,
        command: str,
        began: bool,
    ) -> None:
        self.recipe, self.run, self.base, self.began, self.command = recipe, run, base, began, command
        self.material = self._material(constitution, folder, progress)
        tokenizer = base.tokenizer if base is not None else self._own.tokenizer
        assert recipe.align is not None
        self.work = Work(
            recipe=recipe,
            constitution=constitution,
            run=run,
            ledger=Ledger(run.ledger, signing_key()),
            folder=folder,
            tokenizer=tokenizer,
            chat=chat_format(tokenizer, recipe.align.chat_format),
            strays=base.strays if base is not None else self._own.strays,
            words=_words(base) if base is not None else tuple(self._own.shards.words),
            closed=base is None or base.closed,
            progress=progress,
            command=command,
            settings={},
            start=None if base is None else base.model,
        )

    @property
    def _own(self) -> corpus.Material:
        assert self.material is not None
        return self.material

    def _material(
        self, constitution: Constitution, folder: Path, progress: Progress
    ) -> corpus.Material | None:
        """What a from-scratch run trains on; None with a base, whose tokenizer is copied into the run."""
        if self.began:
            return None if self.base is not None else corpus.reopen(self.run)
        shutil.rmtree(self.run.data, ignore_errors=True)  # half-made by a process that was killed
        self.run.create()
        material = None
        if self.base is None:
            progress.note("preparing data: the closed language, books, tokenizer and shards")
            material = build(self.recipe, constitution, self.run, folder)
        else:
            self.base.tokenizer.save(self.run.path / "tokenizer.json")
        write_json(self.run.recipe, self.recipe.model_dump(mode="json"))
        write_json(self.run.path / "constitution.json", constitution.model_dump(mode="json"))
        return material

    def fresh(self) -> GPT:
        """The model that the run begins with."""
        if self.base is not None:
            return self.base.fresh()
        size = self._own.tokenizer.vocab_size
        return GPT(self.recipe.model_config_for(size)).init_weights(self.recipe.seed)

    def enter(self, allow_change: bool, after_stop: str | None) -> None:
        """Write or check entry 0, and what is trained on."""
        work = self.work
        stages = self.grown() or [self._probe()]
        work.settings = running.enter(
            self.recipe,
            self.run,
            work.ledger,
            stages,
            self.fresh,
            resume=self.began,
            allow_change=allow_change,
            after_stop=after_stop,
        )
        given = self.given()
        told = work.ledger.entries("data")
        if not told:
            if self.base is None:
                body = running.data_entry(self.run, self._own, self.grown())
            else:
                body = self.base.entry(self.run)
            work.ledger.append("data", body | {"given": given})
            return
        changed = [k for k, v in given.items() if told[0]["body"].get("given", {}).get(k) != v]
        if changed:
            raise RecipeError(
                f"{self.run.path}: {', '.join(changed)}: not what the run was begun with; restore it, or "
                "start a new run"
            )

    def given(self) -> dict[str, str]:
        """Digests of what the recipe names and does not hold: constitution, prompts, base."""
        prompts = self.work.prompts
        asked = [[[m["role"], m["content"]] for m in p] for p in prompts.every]
        return {
            "constitution": self.work.constitution.digest(),
            "prompts": digest_of([len(prompts.red_team), asked]),
            "base": "" if self.base is None else self.base.digest,
        }

    def _probe(self) -> Stage:
        """A stage of the size of the supervised one, to choose precision and threads by."""
        assert self.base is not None
        return self.base.probe(
            self.work.supervised, self.work.turns(self.base.model), self.work.prompts.every
        )

    def grown(self) -> list[Stage]:
        """The stages before the phases."""
        if self.base is not None:
            return []
        context = int(self.recipe.model["context"])
        stages = []
        for config in self.work.grown:
            stage = running.make_stage(config, self.recipe, self._own)
            if config.objective == "sft":
                size = (self.recipe.seed, config.batch_size, context)
                batches = HelperBatches(self._own.shards, self._own.tokenizer, *size)
                stage = replace(stage, batches=batches.batch)
            stages.append(stage)
        return stages

    # -- the phases --------------------------------------------------------------------------------------

    def to_the_end(self) -> Outcome:
        """Whatever is not done yet, in order; what there is to report is reported however it ends."""
        work = self.work
        try:
            outcome = self.phases()
        except (Stopped, TrainingError):
            if not work.grown or work.trained(work.grown[-1]) is not None:
                tell(work)
            raise
        tell(work)
        return outcome

    def phases(self) -> Outcome:
        """Grow, revise, train; judge, reward, train."""
        work, stages = self.work, self.grown()
        if stages:
            self.train(stages, self.fresh, more=True)
        supervised.write_revisions(work)
        stages = [*stages, supervised.stage_of(work, work.base())]
        outcome = self.train(stages, self.fresh, more=work.policy is not None)
        if work.policy is None:
            return outcome
        write_preferences(work)
        if work.policy.objective != "dpo":
            train_reward(work)
            if (work.home / "preferences-held-out.jsonl").is_file():
                train_reward(work, policy.WATCH, "preferences-held-out.jsonl")
        model = work.after(work.supervised)
        stages = [*stages, policy.stage_of(work, model)]
        return self.train(stages, self._policy, trainee=policy.trainee_of(work, model))

    def _policy(self) -> Any:
        return policy.policy_of(self.work, self.work.after(self.work.supervised))

    def gate(self) -> Any:
        """The gate of the recipe's constraints; None without any."""
        return gate_for(self.work, self.material) if self.recipe.constraint else None

    def train(
        self,
        stages: list[Stage],
        make: Callable[[], Any],
        *,
        more: bool = False,
        trainee: Trainee = LANGUAGE,
    ) -> Outcome:
        """Train the last of ``stages``, or all those before the phases; those done are only named."""
        work = self.work
        at = position(work.ledger.entries())
        if at.head is not None and at.at_head.stage_index >= len(stages):  # a later stage has begun
            return Outcome(False, self._end(stages), at.reason, at.rollbacks, at.gates, at.elapsed_s)
        if len(stages) > len(work.grown):  # interventions of stages that are done have no place in this call
            bare = [replace(s, config=s.config.model_copy(update={"intervention": ()})) for s in stages[:-1]]
            stages = [*bare, stages[-1]]
        settings = {**work.settings} if trainee is LANGUAGE else {**work.settings, "compile": "off"}
        return run_stages(
            make,
            stages,
            run=self.run,
            ledger=work.ledger,
            gate=self.gate(),
            seed=self.recipe.seed,
            settings=Settings(
                **settings,
                max_rollbacks=self.recipe.gate.max_rollbacks,
                resume_command=self.command,
                more=more,
            ),
            tokenizer_file=self.run.path / "tokenizer.json",
            resume=True,
            progress=work.progress,
            objectives=OBJECTIVES,
            trainee=trainee,
        )

    def _end(self, stages: list[Stage]) -> Any:
        config = self.recipe.stage[len(stages) - 1]
        return self.work.trained(config)


def _words(base: Base) -> tuple[str, ...]:
    """Words that searches try: those of the packaged books, where the model's own text is not known."""
    return base.words or tuple(word_types(d.text or "" for d in books.documents()))
