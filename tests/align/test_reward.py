"""Reward models and DPO recover what the preferences were made from; a reward at chance starts no RL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.bandit import CONFIG, PROMPT, REWARDS, SETTINGS, V, distance, new_gpt, probabilities, rows, tilted
from glasshouse.align.calibration import RewardAtChance, calibrate, refuse_if_chance
from glasshouse.align.dpo import DPOTrainee, best_of, best_of_kl
from glasshouse.align.policy import KLBlowUp, Policy
from glasshouse.align.preferences import (
    Preference,
    load_preferences,
    pair_batches,
    preference_plan,
    split,
)
from glasshouse.align.reward import Ensemble, RewardModel, RewardTrainee, load_reward, save_reward
from glasshouse.align.rl import OBJECTIVES
from glasshouse.align.rollout import Drawing
from glasshouse.base.errors import CheckpointError, DataError, Interrupted, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.train import Outcome, Stage, StageConfig, enter_run, environment, load_weights, run_stages

BETA = 0.5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def preferences() -> list[Preference]:
    """Every pair of words, labelled by how often a person with these rewards prefers the first."""
    made = []
    for a, b in itertools.permutations(range(V), 2):
        p = float((REWARDS[a] - REWARDS[b]).sigmoid())
        made.append(Preference(PROMPT, (a,), (b,), p))
    return made


def train(
    folder: Path, model: Callable[[], Any], trainee: Any, objective: str, resume: bool = False, **changes: Any
) -> Outcome:
    shards = {"pairs": preferences()}
    shape = {"steps": 100, "batch_size": 56, "optimizer": "adamw", "adam_lr": 0.02, "weight_decay": 0.0}
    shape |= {"on_spike": "log", "monitor_every": 1, "log_every": 1, "decay_share": 0.6, "adam_beta2": 0.99}
    config = StageConfig(**({"name": "learn", "objective": objective} | shape | changes.pop("stage", {})))
    stage = Stage(config, pair_batches(shards, config.batch_size, seed=0), preference_plan(shards))
    run = RunFolder(folder).create()
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        now = environment(1, SETTINGS.dtype, SETTINGS.muon_dtype)
        enter_run(ledger, recipe_digest="pairs", environment=now, resume=resume and len(ledger) > 0)
        return run_stages(
            model,
            [stage],
            run=run,
            ledger=ledger,
            settings=SETTINGS,
            resume=resume,
            trainee=trainee,
            **({"objectives": OBJECTIVES} | changes),
        )


def new_reward() -> RewardModel:
    return RewardModel(GPT(CONFIG).init_weights(1))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Path]:
    folder = tmp_path_factory.mktemp("reward") / "run"
    outcome = train(folder, new_reward, RewardTrainee(), "reward")
    return load_reward(outcome.checkpoint), folder


def scores(model: RewardModel) -> Tensor:
    return model([PROMPT] * V, [(a,) for a in range(V)]).values


# -- reward models -----------------------------------------------------------------------------------------


def test_soft_labels_give_back_the_rewards_they_were_made_from(learnt: tuple[RewardModel, Path]) -> None:
    model, folder = learnt
    found = scores(model)
    assert torch.allclose(found - found.mean(), REWARDS - REWARDS.mean(), atol=0.03)
    first, *_, last = rows(folder, "train")
    entropy = sum(-r.p * math.log(r.p) - (1 - r.p) * math.log(1 - r.p) for r in preferences()) / 56
    assert first["loss"] == pytest.approx(math.log(2)) and last["loss"] == pytest.approx(entropy, abs=1e-3)


def test_the_report_knows_the_floor_the_chance_and_how_sure_it_may_be(
    learnt: tuple[RewardModel, Path],
) -> None:
    told = calibrate(learnt[0], preferences())
    assert told.accuracy.value == 1.0 and told.accuracy.n == 1  # pairs of one prompt count once
    assert told.ece < 0.01 and told.floor <= told.log_loss < told.floor + 1e-3 < told.chance == math.log(2)
    assert sum(b.n for b in told.bins) == told.n == 56
    doubled = calibrate(lambda p, a: 3 * scores(learnt[0])[torch.tensor([x[0] for x in a])], preferences())
    assert doubled.ece > 0.1 and doubled.log_loss > told.log_loss + 0.05  # over-sure is seen
    assert json.loads(json.dumps(told.rows()))["accuracy"]["n"] == 1


def pairs_of(right: int, n: int) -> list[Preference]:
    """``n`` prompts; a reward that likes word 3 best is right about so many."""
    return [Preference((0, i % V, i // V), (3,), (5,), 1.0 if i < right else 0.0) for i in range(n)]


def test_rl_is_refused_while_the_interval_holds_a_half() -> None:
    def likes_three(prompts: Any, answers: Any) -> list[float]:
        return [float(a[0] == 3) for a in answers]

    refuse_if_chance(calibrate(likes_three, pairs_of(60, 80)))
    for right in (10, 40, 45):
        with pytest.raises(RewardAtChance, match=r"does not exclude a coin's 0\.5: RL does not start"):
            refuse_if_chance(calibrate(likes_three, pairs_of(right, 80)))
    with pytest.raises(RewardAtChance):  # a constant reward ties always, and a tie is wrong
        refuse_if_chance(calibrate(lambda p, a: [0.0] * len(a), pairs_of(80, 80)))
    with pytest.raises(DataError, match="every p is 0.5"):
        calibrate(likes_three, [Preference(PROMPT, (1,), (2,), 0.5)])


def test_a_score_is_of_the_last_token_and_batch_mates_do_not_matter(learnt: tuple[RewardModel, Path]) -> None:
    model = learnt[0]
    prompts, answers = [(0,), (1, 2, 3), (4,)], [(1, 2), (3,), (5, 6, 7, 1)]
    found = model(prompts, answers, batch_size=3).values
    for i in range(3):
        row = torch.tensor([[*prompts[i], *answers[i]]])
        with torch.no_grad():
            alone = float(model.head(model.body.hidden(row)[0, -1]))
        assert float(found[i]) == pytest.approx(alone, abs=1e-5)


def test_saved_and_loaded_it_gives_the_same_rewards(learnt: tuple[RewardModel, Path], tmp_path: Path) -> None:
    model = load_reward(learnt[1] / "checkpoints" / "learn-000100.0")
    model.standardise([PROMPT] * V, [(a,) for a in range(V)])
    found = scores(model)
    assert float(found.mean()) == pytest.approx(0, abs=1e-5) and float(found.std()) == pytest.approx(
        1, abs=1e-4
    )
    save_reward(model, tmp_path / "kept")
    assert torch.equal(scores(load_reward(tmp_path / "kept")), found)
    with pytest.raises(UsageError, match="holds no reward model"):
        load_reward(tmp_path)
    (tmp_path / "kept" / "reward.safetensors").write_bytes(
        (tmp_path / "kept" / "model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="not the head"):
        load_reward(tmp_path / "kept")


@pytest.mark.parametrize("at", [1, 8, 19])
def test_interrupted_and_resumed_a_reward_model_ends_in_the_same_bits(tmp_path: Path, at: int) -> None:
    shape = {"steps": 20, "save_every": 6, "batch_size": 24}
    whole = train(tmp_path / "whole", new_reward, RewardTrainee(), "reward", stage=shape)
    steps = itertools.count()

    def broken(model: Any, batch: Any) -> Any:
        if next(steps) == at:
            raise KeyboardInterrupt
        return OBJECTIVES["reward"](model, batch)

    with pytest.raises(Interrupted):
        train(
            tmp_path / "cut",
            new_reward,
            RewardTrainee(),
            "reward",
            stage=shape,
            objectives={"reward": broken},
        )
    resumed = train(tmp_path / "cut", new_reward, RewardTrainee(), "reward", stage=shape, resume=True)
    assert resumed.checkpoint.digest == whole.checkpoint.digest


def test_an_ensemble_is_its_mean_and_says_where_its_members_disagree() -> None:
    one, other = (lambda p, a: REWARDS[[x[0] for x in a]]), (lambda p, a: REWARDS[[x[0] for x in a]] * 3)
    given = Ensemble([one, other])([PROMPT] * V, [(a,) for a in range(V)])
    assert torch.allclose(given.values, 2 * REWARDS)
    assert torch.allclose(given.extra["disagreement"], REWARDS.abs() * math.sqrt(2), atol=1e-6)
    careful = Ensemble([one, other], caution=1.0)([PROMPT] * V, [(a,) for a in range(V)])
    assert torch.allclose(careful.values, given.values - given.extra["disagreement"])
    with pytest.raises(UsageError, match="at least two"):
        Ensemble([one])


# -- DPO and best of n -------------------------------------------------------------------------------------


def test_dpo_on_soft_labels_ends_in_the_closed_form(tmp_path: Path) -> None:
    """beta times the difference of two words' log-ratios is the difference of their rewards."""
    ref = probabilities(new_gpt())
    out = train(tmp_path / "run", lambda: Policy(new_gpt()), DPOTrainee(BETA), "dpo", stage={"steps": 200})
    after = probabilities(load_weights(out.checkpoint))
    ratio = BETA * (after.log() - ref.log())
    assert torch.allclose(ratio - ratio.mean(), REWARDS - REWARDS.mean(), atol=0.03)
    assert distance(after, tilted(ref, BETA)) < 0.01 < 0.4 < distance(ref, tilted(ref, BETA))
    first, *_, last = rows(tmp_path / "run")
    assert first["accuracy"] == 0.0 == first["reward"] and last["accuracy"] == 1.0  # all ties at first
    assert {"chosen", "rejected", "length"} <= last.keys()


def test_dpo_that_goes_too_far_halts(tmp_path: Path) -> None:
    with pytest.raises(KLBlowUp, match="stage 'learn', step"):
        train(tmp_path / "run", lambda: Policy(new_gpt()), DPOTrainee(0.01, moved_at_most=1.0), "dpo")
    entries = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries[-2:]] == ["checkpoint", "stop"]


def test_best_of_n_takes_the_best_and_its_distance_is_below_the_bound() -> None:
    gpt, n = new_gpt(), 4
    found = best_of(gpt, [PROMPT] * 800, n, lambda p, a: REWARDS[[x[0] for x in a]], Drawing(1))
    assert all(b.reward == max(b.rewards) == float(REWARDS[b.answer.ids[0]]) for b in found)
    ref = probabilities(gpt)
    order = REWARDS.argsort()
    below = ref[order].cumsum(0)
    best = torch.empty(V)
    best[order] = below**n - torch.cat([torch.zeros(1), below[:-1]]) ** n
    counts = torch.bincount(torch.tensor([b.answer.ids[0] for b in found]), minlength=V) / 800
    assert distance(counts, best) < 0.08
    assert float((best * (best / ref).log()).sum()) < best_of_kl(n) == pytest.approx(math.log(4) - 0.75)


# -- rows --------------------------------------------------------------------------------------------------


class Letters:
    def prompt(self, messages: Any) -> list[int]:
        return [ord(c) - 96 for m in messages for c in m["content"]]

    def answer(self, text: str) -> list[int]:
        return [*(ord(c) - 96 for c in text), 0]


def test_rows_of_a_file_become_tokens_and_what_cannot_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "ab"}],
        "chosen": "c",
        "rejected": "da",
        "p": 0.75,
        "judge": "x",
    }
    path.write_text(json.dumps(row) + "\n")
    assert load_preferences(path, Letters()) == [Preference((1, 2), (3, 0), (4, 1, 0), 0.75)]
    for change, said in (
        ({"p": 1.5}, "p = 1.5"),
        ({"chosen": ""}, "lacks 'chosen'"),
        ({"p": "a"}, "p = 'a'"),
    ):
        path.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
        with pytest.raises(DataError, match=f"row 2.*{said}"):
            load_preferences(path, Letters())
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_preferences(path, Letters())
    path.write_text("")
    with pytest.raises(DataError, match="no preference row"):
        load_preferences(path, Letters())


def test_no_prompt_is_on_both_sides_of_a_split() -> None:
    every = [Preference((i % 10,), (1,), (2,), 0.9) for i in range(40)]
    learn, held_out = split(every, 0.3)
    assert len(learn) == 28 and len(held_out) == 12
    assert not {r.key for r in learn} & {r.key for r in held_out}


def test_every_row_comes_once_an_epoch_and_quarantined_ones_no_more() -> None:
    shards = {"a": preferences()[:10], "b": preferences()[10:14]}
    batches, plan = pair_batches(shards, 7, seed=0), preference_plan(shards)
    seen = [row for step in (0, 1) for row in batches(step, plan).rows]
    assert sorted(seen, key=repr) == sorted(shards["a"] + shards["b"], key=repr)
    assert batches(0, plan) == batches(0, plan) and batches(2, plan).rows != batches(0, plan).rows
    without = plan.without(["b"], 1)
    assert set(batches(1, without).rows) <= set(shards["a"]) and batches(1, without).shards == ("a",)
