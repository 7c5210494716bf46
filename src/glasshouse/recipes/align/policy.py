"""The last phase: RL against the reward model (PPO, GRPO), or DPO on the preferences themselves."""

from __future__ import annotations

from collections.abc import Mapping

from glasshouse.align.dpo import DPOTrainee
from glasshouse.align.files import PolicyFiles
from glasshouse.align.heldout import HeldOut
from glasshouse.align.policy import Policy, RLConfig, prompt_batches, prompt_plan
from glasshouse.align.preferences import pair_batches, preference_plan
from glasshouse.align.reward import Reward
from glasshouse.align.rl import PolicyTrainee
from glasshouse.align.watch import Online
from glasshouse.base.errors import UsageError
from glasshouse.model import GPT
from glasshouse.recipes.align import gold
from glasshouse.recipes.align.prompts import as_chat
from glasshouse.recipes.align.rewarded import preferences_of, trained_reward
from glasshouse.recipes.align.turns import Turns
from glasshouse.recipes.align.work import Work
from glasshouse.train import Checkpoint, Stage
from glasshouse.train import checkpoint as saving
from glasshouse.train.trainee import Trainee

WATCH = "watch"  # the reward model of the held-out principles
EACH = 2  # answers to each prompt that a run is watched with
WATCHED = 24  # of the user's prompts, where there is no closed language to draw held-out ones from


class _FromTheStageBefore(PolicyFiles):
    """Reads a stage's first checkpoint too: the one before, which is a language model's alone."""

    def read(self, checkpoint: Checkpoint, contents: Mapping[str, bytes], model: Policy) -> Policy:
        if "rl.json" in contents:
            return super().read(checkpoint, contents, model)
        saving.gpt_into(checkpoint, contents, model.gpt)
        model.rollout = None
        if self.watch is not None:
            self.watch.again([])
        return model


class _RL(_FromTheStageBefore, PolicyTrainee):
    pass


class _DPO(_FromTheStageBefore, DPOTrainee):
    pass


def rl_config(work: Work, turns: Turns) -> RLConfig:
    """What the recipe says of RL, with the method of its stage and the chat format's end tokens."""
    stage = work.policy
    assert stage is not None
    if work.align.policy.rl.stop or work.align.policy.rl.vocab is not None:
        raise UsageError(
            "align.policy.rl: stop and vocab follow from the model's chat format: leave them out"
        )
    return work.align.policy.rl.model_copy(
        update={
            "method": stage.objective,
            "stop": tuple(sorted(turns.chat.stop)),
            "vocab": work.tokenizer.vocab_size,
            "seed": work.recipe.seed,
        }
    )


def stage_of(work: Work, model: GPT) -> Stage:
    """The policy's stage: prompts for RL, preferences for DPO. UsageError for sizes that do not divide."""
    config, turns = work.policy, work.turns(model)
    assert config is not None
    if config.objective == "dpo":
        learn, _ = preferences_of(work, turns, work.home / "preferences.jsonl")
        shards = {"preferences": learn}
        batches = pair_batches(shards, config.batch_size, work.recipe.seed)
        return Stage(config.stage(), batches, preference_plan(shards))
    how = rl_config(work, turns)
    room = work.context(model) - how.max_new_tokens
    prompts = [ids for p in work.prompts.every if len(ids := turns.prompt(p)) <= room]
    if not prompts:
        raise UsageError(
            f"no prompt leaves room for {how.max_new_tokens} tokens of an answer in a context of "
            f"{work.context(model)}: shorten max_new_tokens"
        )
    asked = {"prompts": prompts}
    return Stage(config.stage(), prompt_batches(asked, config.stage(), how), prompt_plan(asked))


def trainee_of(work: Work, model: GPT) -> Trainee:
    """How the policy is trained, watched by what it never learns from."""
    config, turns = work.policy, work.turns(model)
    assert config is not None
    if config.objective == "dpo":
        return _DPO(work.align.policy.dpo_beta, work.align.policy.moved_at_most)
    how = rl_config(work, turns)
    probes, held_out = watching(work, turns, how)
    return _RL(
        how,
        trained_reward(work, turns),
        probes=probes,
        held_out=held_out,
        watch=Online() if held_out else None,
    )


def watching(work: Work, turns: Turns, how: RLConfig) -> tuple[dict[str, Reward], HeldOut | None]:
    """Probes of the rollouts, and the score on prompts of its own: the grammar's in the closed language, else
    the reward model of the held-out principles; None where there is neither."""
    if work.closed:
        asked = {tuple(turns.prompt(as_chat(p.text))): p for p in [*work.prompts.known, *work.watched]}
        known, evasive = gold.probes(asked, work.tokenizer, work.constitution)
        prompts = [turns.prompt(as_chat(p.text)) for p in work.watched]
        own = {"evasive": evasive} if work.prompts.known else {}
        return dict(own), HeldOut(prompts, known, each=EACH)
    if work.phase(WATCH) is None:
        return {}, None
    room = turns.engine.model.config.context - how.max_new_tokens
    every = [ids for p in work.prompts.every if len(ids := turns.prompt(p)) < room]
    some = every[:: max(1, len(every) // WATCHED)][:WATCHED]
    return {}, HeldOut(some, trained_reward(work, turns, WATCH), each=EACH, name="held_out", full=4.0)


def policy_of(work: Work, model: GPT) -> Policy:
    """The policy before its first update, the supervised model as its reference."""
    assert work.policy is not None
    return Policy(model, critic=work.policy.objective == "ppo")
