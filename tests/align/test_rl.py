"""PPO and GRPO reach optima that are known, through the loop that trains everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align import bandit
from align.bandit import BEST, REWARDS, distance, new_gpt, probabilities, rows, tilted, train
from glasshouse.align.collect import collect, minibatch, repetition, settled
from glasshouse.align.policy import KLBlowUp, Policy, Prompts, RLConfig, prompt_batches
from glasshouse.align.reward import Rewards
from glasshouse.align.rl import PolicyTrainee
from glasshouse.align.rollout import Embedded
from glasshouse.align.sequences import logprobs, pack, read
from glasshouse.base.errors import CheckpointError, DataError, Stopped, TrainingError, UsageError
from glasshouse.base.ledger import verify_ledger
from glasshouse.model import GPT
from glasshouse.train import StageConfig, load_weights

ONE = {"max_new_tokens": 1}
BETA = 0.5
PPO = RLConfig(method="ppo", group=1, beta=0.0, value_coef=0.5, **ONE)
GRPO = RLConfig(method="grpo", group=8, beta=0.0, **ONE)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def outcome(folder: Path, how: RLConfig, **changes: Any) -> Tensor:
    """The policy's distribution over words after training."""
    return probabilities(load_weights(train(folder, how, **changes).checkpoint))


@pytest.mark.parametrize("how", [PPO, GRPO], ids=["ppo", "grpo"])
def test_the_best_word_is_found(tmp_path: Path, how: RLConfig) -> None:
    before = probabilities(new_gpt())
    assert before[BEST] < 0.06 < float(before.max())
    after = outcome(tmp_path / "run", how, steps=60)
    assert after[BEST] > 0.95
    first, *_, last = rows(tmp_path / "run")
    assert last["reward"] > 0.95 > 0.3 > first["reward"] and last["entropy"] < 0.3 < first["entropy"]
    keys = {"kl", "kl_k3", "clip_fraction", "length", "repetition", "unended", "distinct", "reward_std"}
    assert keys <= last.keys() and ("explained_variance" in last) == (how.method == "ppo")


@pytest.mark.parametrize(
    "how",
    [
        RLConfig(method="ppo", group=1, beta=BETA, whiten=False, value_coef=0.5, **ONE),
        RLConfig(method="grpo", group=16, beta=BETA, scale="none", **ONE),
    ],
    ids=["ppo", "grpo"],
)
def test_with_a_cost_of_distance_the_optimum_is_the_tilted_reference(tmp_path: Path, how: RLConfig) -> None:
    ref = probabilities(new_gpt())
    after = outcome(tmp_path / "run", how, decay_share=0.6)
    assert distance(ref, tilted(ref, BETA)) > 0.4  # far from where it began
    assert distance(after, tilted(ref, BETA)) < 0.01
    # The best reachable E[r] - beta KL is beta log E_ref[exp(r / beta)].
    last = rows(tmp_path / "run")[-1]
    best = BETA * float((ref * (REWARDS / BETA).exp()).sum().log())
    assert last["reward"] - BETA * last["kl"] == pytest.approx(best, abs=0.01)


def test_k3_as_a_loss_has_another_optimum_as_its_docstring_says(tmp_path: Path) -> None:
    """Its gradient is that of KL(ref || p): the fixed point is p = beta ref / (lambda - r), sum one."""
    how = RLConfig(method="grpo", group=16, beta=BETA, scale="none", kl_in="loss", **ONE)
    ref = probabilities(new_gpt())
    low, high = float(REWARDS.max()) + 1e-6, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((BETA * ref / (middle - REWARDS)).sum()) > 1 else (low, middle)
    expected = BETA * ref / (low - REWARDS)
    after = outcome(tmp_path / "run", how, steps=150, decay_share=0.8, batch_size=128)
    assert distance(expected, tilted(ref, BETA)) > 0.3
    assert distance(after, expected) < 0.1


# -- what an update learns from ----------------------------------------------------------------------------

LONG = RLConfig(method="ppo", max_new_tokens=5, stop=(7,), group=4, beta=0.1, epochs=2, minibatches=2)


def drawn(how: RLConfig, step: int = 0, policy: Policy | None = None) -> Any:
    policy = policy or Policy(new_gpt(), _nudged(), critic=True)
    prompts = Prompts(step, ((0,), (1, 2), (3,)), ("a",) * 3)
    return policy, collect(policy, prompts, how, Embedded(), bandit.reward, {"gold": bandit.reward}, "here")


def _nudged() -> GPT:
    gpt = new_gpt()
    with torch.no_grad():
        gpt.head.weight.add_(
            0.3 * torch.randn(gpt.head.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    return gpt


def test_the_generator_s_log_probabilities_are_those_of_a_forward_pass_stop_token_included() -> None:
    policy, rollout = drawn(LONG)
    answers = rollout.sequences.answers()
    assert any(a[-1] == 7 for a in answers) and any(len(a) == 5 for a in answers)
    for row, (tokens, old, ref) in enumerate(
        zip(rollout.sequences.tokens, rollout.old_logp, rollout.ref_logp, strict=True)
    ):
        end, n = int(rollout.sequences.last[row]), len(answers[row])
        for model, found in ((policy.gpt, old), (policy.reference, ref)):
            with torch.no_grad():
                logp = model(tokens[None, : end + 1])[0].log_softmax(-1)
            for k in range(end - n, end):
                assert float(found[k]) == pytest.approx(float(logp[k, tokens[k + 1]]), abs=1e-5)
            assert not found[: end - n].any() and not found[end:].any()


def test_a_row_says_what_was_drawn() -> None:
    _, rollout = drawn(LONG)
    row, answers = rollout.row, rollout.sequences.answers()
    kl = [float((o - r).sum()) for o, r in zip(rollout.old_logp, rollout.ref_logp, strict=True)]
    assert row["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5) and row["kl_k3"] > 0
    assert row["length"] == pytest.approx(sum(map(len, answers)) / len(answers))
    assert row["unended"] == pytest.approx(sum(a[-1] != 7 for a in answers) / len(answers))
    assert row["gold"] == pytest.approx(row["reward"]) and row["answers"] == 12
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(3 / 5) and repetition([4]) == 0.0


def test_the_reward_stands_at_the_last_token_and_the_distance_at_every_one() -> None:
    _, rollout = drawn(LONG)
    how = LONG.model_copy(update={"whiten": False, "lam": 1.0})
    made = settled(rollout, how, torch.zeros_like(rollout.old_logp))
    for i in range(len(rollout.reward)):
        at = rollout.sequences.mask[i].nonzero().flatten().tolist()
        left = float(rollout.reward[i])
        for k in reversed(at):
            left -= 0.1 * float(rollout.old_logp[i, k] - rollout.ref_logp[i, k])
            assert float(made.advantages[i, k]) == pytest.approx(left, abs=1e-5)


def test_minibatches_deal_every_answer_once_an_epoch() -> None:
    _, rollout = drawn(LONG)
    numbered = settled(rollout, LONG, torch.zeros_like(rollout.old_logp))
    numbered.reward.copy_(torch.arange(12.0))
    parts = [minibatch(numbered, step, LONG).reward.tolist() for step in range(4)]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == list(range(12))
    assert parts[0] != parts[2]


def test_rewards_may_be_cut_and_answers_without_an_end_punished() -> None:
    _, plain = drawn(LONG)
    _, changed = drawn(LONG.model_copy(update={"unended": -9.0, "reward_limit": 2.0}))
    cut = torch.tensor([a[-1] != 7 for a in plain.sequences.answers()])
    assert torch.equal(changed.reward, torch.where(cut, -2.0, plain.reward))


def test_many_logits_are_made_in_pieces_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for limit in (2**24, 16):
        monkeypatch.setattr("glasshouse.align.sequences.LOGITS_AT_ONCE", limit)
        gpt = new_gpt()
        packed = pack([[0], [1, 2]], [[3, 4, 5], [6]], context=8)
        seen = read(gpt, packed, entropy="gradient")
        (seen.logp.sum() + seen.entropy.square().sum()).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4) and gradients[0].norm() > 0.1
    assert torch.allclose(seen.logp, logprobs(gpt, packed, batch_size=1), atol=1e-6)


# -- what must not go on -----------------------------------------------------------------------------------


def test_a_policy_that_went_too_far_halts_with_everything_saved(tmp_path: Path) -> None:
    how = GRPO.model_copy(update={"kl_at_most": 1.0})
    with pytest.raises(KLBlowUp, match=r"1 were declared the most; everything up to here is saved"):
        train(tmp_path / "run", how, steps=60, adam_lr=0.0003)
    entries = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    saved, stop = entries[-2:]
    assert saved["kind"] == "checkpoint" and saved["body"]["why"] == "halt" and stop["kind"] == "stop"
    assert (
        stop["body"]["checkpoint"] == saved["body"]["checkpoint"]
        and "nats an answer" in stop["body"]["reason"]
    )
    assert saved["body"]["step"] == len(rows(tmp_path / "run")) > 2
    assert all(row["kl"] <= 1.0 for row in rows(tmp_path / "run"))
    with pytest.raises(Stopped, match="nats an answer"):
        train(tmp_path / "run", how, steps=60, adam_lr=0.0003, resume=True)


@pytest.mark.parametrize("given", [lambda p, a: [float("nan")] * len(a), lambda p, a: [0.0]])
def test_a_reward_that_is_no_number_for_every_answer_ends_the_run(tmp_path: Path, given: Any) -> None:
    with pytest.raises(TrainingError, match=r"stage 'rl', step 0: the reward gave"):
        train(tmp_path / "run", GRPO, steps=2, trainee=PolicyTrainee(GRPO, given))


def test_probes_and_disagreement_stand_in_the_rows_and_teach_nothing(tmp_path: Path) -> None:
    def told(prompts: Any, answers: Any) -> Rewards:
        return Rewards(bandit.reward(prompts, answers), {"disagreement": torch.full((len(answers),), 0.25)})

    def gold(prompts: Any, answers: Any) -> Tensor:
        return -bandit.reward(prompts, answers)

    trainee = PolicyTrainee(GRPO, told, probes={"gold": gold})
    with_probe = train(tmp_path / "a", GRPO, steps=4, trainee=trainee).checkpoint
    for row in rows(tmp_path / "a"):
        assert row["gold"] == pytest.approx(-row["reward"]) and row["disagreement"] == 0.25
    assert with_probe.digest == train(tmp_path / "b", GRPO, steps=4).checkpoint.digest


def test_what_does_not_divide_is_refused_before_anything_is_trained() -> None:
    def asked(how: RLConfig, **changes: Any) -> None:
        shape = {"name": "rl", "objective": "ppo", "steps": 8, "batch_size": 8} | changes
        prompt_batches({"a": [(0,)]}, StageConfig(**shape), how)

    asked(LONG)
    for changes in ({"batch_size": 6}, {"steps": 6}, {"gate_every": 3}, {"accumulate": 2}):
        with pytest.raises(UsageError, match="stage 'rl'"):
            asked(LONG, **changes)
    with pytest.raises(ValueError, match="at least 2"):
        RLConfig(method="grpo", group=1, max_new_tokens=1)
    with pytest.raises(UsageError, match="critic=True"):
        PolicyTrainee(LONG, bandit.reward).prepare(Policy(new_gpt()), "fp32", "off")
    with pytest.raises(DataError, match="context"):
        pack([[0] * 8], [[1, 2]], context=8)


def test_another_reference_on_resume_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", GRPO, steps=3)
    ledger = tmp_path / "run" / "ledger.jsonl"
    checkpoint = json.loads(ledger.read_text().splitlines()[-2])["body"]["checkpoint"]
    folder = tmp_path / "run" / "checkpoints" / checkpoint
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    class At:
        path = folder

    trainee = PolicyTrainee(GRPO, bandit.reward)
    trainee.read(At(), contents, Policy(new_gpt()))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="another reference"):
        trainee.read(At(), contents, Policy(new_gpt(), _nudged()))  # type: ignore[arg-type]


# -- killed and resumed ------------------------------------------------------------------------------------

Run = Callable[..., int]


@pytest.fixture(scope="module")
def killable(glasshouse_home: Path) -> Iterator[Run]:
    """Trains in a child of a process that imported torch once; returns the child's exit status."""
    tests = Path(bandit.__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLASSHOUSE_HOME": str(glasshouse_home)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", bandit.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as driver:
        assert driver.stdin and driver.stdout

        def order(folder: Path, method: str, crash: str = "", resume: bool = False) -> int:
            assert driver.stdin and driver.stdout
            what = {"folder": str(folder), "method": method, "crash": crash, "resume": resume}
            driver.stdin.write(json.dumps(what) + "\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        yield order
        driver.stdin.close()


def weights_of(folder: Path) -> dict[str, bytes]:
    """Everything in the last checkpoint but what the ledger's clock decides (nothing)."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in sorted(last.iterdir())}


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_killed_anywhere_and_resumed_it_ends_in_the_same_bits(
    killable: Run, tmp_path: Path, method: str
) -> None:
    """Checkpoints fall at steps 3 and 6; a rollout of ppo lasts 4 updates, so both stand inside of one."""
    assert killable(tmp_path / "whole", method) == 0
    whole = weights_of(tmp_path / "whole")
    middle = {path.name for path in (tmp_path / "whole" / "checkpoints" / "rl-000003.0").iterdir()}
    assert ("rollout.safetensors" in middle) == (method == "ppo") == ("critic.safetensors" in middle)
    for crash in ("step:5", "checkpoint.before-rename:2", "checkpoint.after-rename:3"):
        folder = tmp_path / crash.replace(":", "-")
        assert killable(folder, method, crash=crash) == 9
        assert killable(folder, method, resume=True) == 0
        assert weights_of(folder) == whole
        assert not verify_ledger(folder / "ledger.jsonl").problems

        def timeless(run: Path) -> list[dict[str, Any]]:
            return [{k: v for k, v in row.items() if k != "t"} for row in rows(run)]

        assert timeless(folder) == timeless(tmp_path / "whole")
