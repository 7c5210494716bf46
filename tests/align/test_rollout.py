"""Whoever samples, the answers are the same; a served engine is given the policy's weights first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from align.bandit import new_gpt
from glasshouse.align.collect import collect
from glasshouse.align.local import LocalEngine
from glasshouse.align.policy import Policy, Prompts, RLConfig
from glasshouse.align.rollout import (
    Answer,
    Drawing,
    Embedded,
    EngineRollouts,
    LocalWorkers,
    RayRollouts,
    Rollouts,
    dealt,
)
from glasshouse.base.errors import TrainingError, UsageError
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.digest import weights_digest
from glasshouse.tokenizer import Tokenizer, parse

PROMPTS = [[0], [1, 2, 3], [4, 5], [0], [6]]
SEEDS = [11, 12, 13, 14, 15]
HOW = Drawing(4, stop=(7,), vocab=8)


def moved() -> GPT:
    gpt = new_gpt()
    with torch.no_grad():
        gpt.head.weight.mul_(-1)
    return gpt


Answers = list[tuple[list[int], bool, list[float]]]


def drawn_by(rollouts: Rollouts) -> list[Answers]:
    """What is answered under two sets of weights, one after the other."""
    try:
        return [
            [
                (list(a.ids), a.ended, list(a.logprobs or ()))
                for a in rollouts.sample(gpt, PROMPTS, SEEDS, HOW)
            ]
            for gpt in (new_gpt(), moved())
        ]
    finally:
        rollouts.close()


def same(one: list[Answers], other: list[Answers]) -> bool:
    """Whether tokens and endings are equal, and log-probabilities to a millionth."""
    pairs = [p for x, y in zip(one, other, strict=True) for p in zip(x, y, strict=True)]
    alike = all(a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-6) for a, b in pairs)
    return alike and all(len(a[2]) == len(a[0]) > 0 for a, _ in pairs)


def test_answers_differ_with_seed_and_weights_and_with_nothing_else() -> None:
    gpt, here = new_gpt(), Embedded()
    first = here.sample(gpt, PROMPTS, SEEDS, HOW)
    assert [a.ids for a in first] == [a.ids for a in here.sample(gpt, PROMPTS, SEEDS, HOW)]
    assert here.sample(gpt, PROMPTS[1:2], SEEDS[1:2], HOW)[0].ids == first[1].ids
    assert [a.ids for a in first] != [a.ids for a in here.sample(gpt, PROMPTS, [s + 9 for s in SEEDS], HOW)]
    assert [a.ids for a in first] != [a.ids for a in here.sample(moved(), PROMPTS, SEEDS, HOW)]
    for answer in first:
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.ids) <= 4
        assert answer.ended == (answer.ids[-1] == 7)


def test_worker_processes_give_the_same_answers() -> None:
    assert same(drawn_by(LocalWorkers(2)), drawn_by(Embedded()))


def test_ray_actors_give_the_same_answers() -> None:
    pytest.importorskip("ray", reason="the extra [scale] is not installed")
    assert same(drawn_by(RayRollouts(2)), drawn_by(Embedded()))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'glasshouse\[scale\]'"):
        RayRollouts(2)
    with pytest.raises(UsageError, match="at least one worker"):
        LocalWorkers(0)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_every_prompt_is_dealt_to_one_worker(workers: int) -> None:
    shares = dealt(PROMPTS, workers)
    assert sorted(i for share in shares for i in share) == list(range(len(PROMPTS)))
    assert all(shares) and len(shares) == min(workers, len(PROMPTS))


def test_an_engine_answers_with_the_policy_s_weights_and_its_log_probabilities_are_made_here() -> None:
    """The engine is a real one: another copy of the model, with tokenizer and chat format."""
    tok = Tokenizer.train(["the cat sat on the mat and the dog sat on the cat"] * 4, 290)
    config = GPTConfig(vocab_size=tok.vocab_size, context=64, d_model=16, n_layer=1, n_head=2)
    policy, served = GPT(config).init_weights(5), GPT(config).init_weights(6)
    engine = LocalEngine(served, tok)
    published: list[str] = []

    def publish(gpt: GPT) -> None:
        served.load_state_dict(gpt.state_dict())
        published.append(weights_digest(gpt))

    def messages(ids: Sequence[int]) -> Any:
        return parse(tok, ids, unfinished=True)[:-1]

    end = tok.specials["<|end|>"]
    rollouts = EngineRollouts(engine, publish=publish, messages=messages, encode=tok.encode, end=end)
    prompts = [tuple(engine.ids([{"role": "user", "content": text}])) for text in ("the cat", "the dog sat")]
    assert [messages(p)[-1]["content"] for p in prompts] == ["the cat", "the dog sat"]
    how = RLConfig(method="grpo", group=2, max_new_tokens=6, stop=(end,), vocab=tok.vocab_size)
    rollout = collect(
        Policy(policy),
        Prompts(0, tuple(prompts), ("a", "a")),
        how,
        rollouts,
        lambda p, a: [0.0] * len(a),
        {},
        "",
    )
    assert published == [weights_digest(policy)] == [weights_digest(served)]
    for row, answer in enumerate(rollout.sequences.answers()):
        last = int(rollout.sequences.last[row])
        with torch.no_grad():
            logp = policy(rollout.sequences.tokens[row : row + 1, : last + 1])[0].log_softmax(-1)
        told = sum(float(logp[last - len(answer) + k, x]) for k, x in enumerate(answer))
        assert float(rollout.old_logp[row].sum()) == pytest.approx(told, abs=1e-4)
    assert rollout.row["kl"] == pytest.approx(0.0, abs=1e-5)


def test_an_engine_that_says_nothing_ends_the_run_by_name() -> None:
    class Silent:
        def sample(self, model: Any, prompts: Any, seeds: Any, how: Any) -> list[Answer]:
            return [Answer([], True) for _ in prompts]

        def close(self) -> None: ...

    how = RLConfig(method="grpo", group=2, max_new_tokens=2)
    with pytest.raises(TrainingError, match="stage 'rl', step 3: whoever samples gave an answer of nothing"):
        collect(
            Policy(new_gpt()),
            Prompts(3, ((0,),), ("a",)),
            how,
            Silent(),
            lambda p, a: [0.0] * len(a),
            {},
            "stage 'rl', step 3",
        )
