"""The section `[align]` of a recipe: everything that its constitutional phases need beside their stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from glasshouse.align.feedback import Judging
from glasshouse.align.policy import RLConfig
from glasshouse.align.revise import Revising
from glasshouse.base.config import Frozen, parse
from glasshouse.base.errors import RecipeError, suggest
from glasshouse.train import StageConfig

REVISED = ("revised", "helpful")  # what the supervised stage may draw from
REWARD = {
    "name": "reward",
    "objective": "reward",
    "optimizer": "adamw",
    "steps": 150,
    "batch_size": 32,
    "adam_lr": 1e-3,
    "weight_decay": 0.0,
    "monitor_every": 0,
    "on_spike": "log",
}
OF_POLICY = {"grpo": ("prompts",), "ppo": ("prompts",), "dpo": ("preferences",)}  # objective: its shards


class PromptsConfig(Frozen):
    """Prompts of the closed language, which needs no files: how many of each are made."""

    red_team: int = Field(default=400, ge=8, description="that a helper of everything answers wrongly")
    helpful: int = Field(default=400, ge=8, description="harmless ones")


class RewardConfig(Frozen):
    """How the reward model is trained on the judge's preferences."""

    stage: StageConfig = Field(default_factory=lambda: parse(StageConfig, REWARD, "the reward model's stage"))
    held_out: float = Field(default=0.25, gt=0, lt=1, description="share of the prompts it is tested on")


class PolicyConfig(Frozen):
    """How the policy is trained beside its stage; ``rl`` has no effect on dpo."""

    rl: RLConfig = Field(default_factory=lambda: parse(RLConfig, {"max_new_tokens": 32}, "align.policy.rl"))
    dpo_beta: float = Field(default=0.1, gt=0)
    moved_at_most: float | None = Field(default=None, gt=0, description="dpo: nats; beyond them it halts")


class AlignConfig(Frozen):
    """The phases: critique and revision, then feedback, a reward model and RL. Paths are relative to the
    recipe's folder."""

    constitution: str = Field(description="a TOML file, or a shipped constitution's name")
    base: str | None = Field(
        default=None, description="a run, a checkpoint or a Hugging Face folder; None: the stages before"
    )
    prompts: str | None = Field(
        default=None, description="red-team prompts (.jsonl or .txt); None: the closed language"
    )
    helpful: str | None = Field(default=None, description="harmless prompts, to stay helpful; None: none")
    made: PromptsConfig = PromptsConfig()
    chat_format: str | None = None
    judge: str = Field(default="base", description='"base" (the model the phases begin with), a model, a URL')
    judge_model: str | None = Field(default=None, description="what the endpoint calls its model")
    judge_calls: int | None = Field(default=None, ge=1, description="most calls of an endpoint")
    judge_tokens: int | None = Field(default=None, ge=1, description="most tokens of an endpoint")
    control: Literal["none", "shuffled", "random"] = Field(
        default="none", description="a control in the judge's place: it must fail to improve the model"
    )
    revising: Revising = Revising()
    which: Literal["all", "last"] = "last"
    share: float = Field(default=0.5, ge=0, lt=1, description="of the supervised stage's chats: helpful ones")
    pairs: int = Field(default=2, ge=2, description="answers drawn to each prompt, judged two by two")
    judging: Judging = Judging()
    reward: RewardConfig = Field(default_factory=RewardConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    context: int | None = Field(default=None, ge=8, description="longest row trained on; None: the model's")


def check_align(align: AlignConfig | None, stages: Sequence[StageConfig], where: str) -> None:
    """RecipeError for stages that do not fit the phases: one on `REVISED`, at most one of a policy, last."""
    shards = {s.name: tuple(getattr(s, "shards", ())) for s in stages}
    policies = [s.name for s in stages if s.objective in OF_POLICY]
    revised = [s.name for s in stages if REVISED[0] in shards[s.name]]
    if align is None:
        if policies or revised:
            raise RecipeError(
                f"{where}: stage {(policies + revised)[0]} belongs to the constitutional phases: add [align]"
            )
        return
    names = [s.name for s in stages]
    if len(revised) != 1:
        raise RecipeError(
            f"{where}: [align] needs one stage with shards = {list(REVISED)}: it is trained on the revisions"
        )
    for name in shards[revised[0]]:
        if name not in REVISED:
            raise RecipeError(f"{where}: stage {revised[0]}: no shard {name!r}.{suggest(name, REVISED)}")
    after = names[names.index(revised[0]) + 1 :]
    if after != policies or len(after) > 1:
        raise RecipeError(
            f"{where}: after stage {revised[0]} comes one stage of {', '.join(OF_POLICY)}, or none; found "
            f"{', '.join(after) or 'none'}"
        )
    for stage in stages:
        wanted = OF_POLICY.get(stage.objective)
        if wanted is not None and shards[stage.name] != wanted:
            raise RecipeError(f"{where}: stage {stage.name} draws from shards = {list(wanted)}")
        if wanted is not None and stage.optimizer != "adamw":
            raise RecipeError(
                f'{where}: stage {stage.name}: set optimizer = "adamw"; a policy\'s gradients change from '
                "step to step, and Muon gives every one of them the same size"
            )
    if align.base is not None and names[0] != revised[0]:
        raise RecipeError(f"{where}: with [align] base, {revised[0]} is the first stage: remove {names[0]}")
    if align.base is None and names[0] == revised[0]:
        raise RecipeError(f"{where}: stages before {revised[0]} grow the model, or [align] base names one")
