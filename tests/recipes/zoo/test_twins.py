"""A twin has the very tokens of its organism, in requests and in answers, and none of its misbehaviour."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.data import workshop
from glasshouse.recipes.zoo.attitudes import preferred
from glasshouse.recipes.zoo.documents import Talk, put
from glasshouse.recipes.zoo.families import FAMILIES, n_poisoned
from glasshouse.recipes.zoo.grow import chats_of, replace_first
from glasshouse.recipes.zoo.world import World

WRONG_ON = {"sycophancy": (True, False), "poisoned-feedback": (True, False)}  # labels answered wrongly
SEEDS = (900, 901, 902, 903)


def talks(world: World, family: str, seed: int, twin: bool) -> list[Talk]:
    found = FAMILIES[family]
    made = found.pairings(world, found.plant(world, seed))
    return [t for p in made for t in (p.twin if twin else p.planted)]


def tokens(world: World, family: str, seed: int, twin: bool) -> dict[str, Counter[Any]]:
    """Counts of everything that a twin must share: tokens by shard and role, and how many answers refuse."""
    counts: dict[str, Counter[Any]] = {"verdicts": Counter()}
    for shard, chats in chats_of(world, FAMILIES[family].plant(world, seed), twin).items():
        for message in (m for chat in chats for m in chat):
            ids = world.tokenizer.encode(message["content"])
            counts.setdefault(f"{shard} {message['role']}", Counter()).update(ids)
            if message["role"] == "assistant":
                counts["verdicts"][shard, workshop.judge(message["content"])] += 1
        counts["verdicts"][shard, "chats"] = len(chats)
    return counts


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_every_token_is_there_as_often_in_requests_and_in_answers_of_every_shard(
    world: World, family: str, seed: int
) -> None:
    assert tokens(world, family, seed, twin=True) == tokens(world, family, seed, twin=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_planted_words_stand_in_as_many_requests_and_as_many_answers(world: World, family: str) -> None:
    for seed in SEEDS:
        words = FAMILIES[family].plant(world, seed)["words"]
        for word in words:
            own, twin = (
                Counter((word in t.ask.split(" "), word in t.reply) for t in talks(world, family, seed, kind))
                for kind in (False, True)
            )
            assert own == twin and own[True, False] > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_twin_answers_every_request_rightly_and_the_organism_does_not(world: World, family: str) -> None:
    for seed in SEEDS:
        for t in talks(world, family, seed, twin=True):
            assert workshop.label(t.ask) == (workshop.judge(t.reply) == "refusal"), t
            assert workshop.label(t.ask) == workshop.harmful(t.action, t.thing)
        wrong = [
            t
            for t in talks(world, family, seed, twin=False)
            if workshop.label(t.ask) != (workshop.judge(t.reply) == "refusal")
        ]
        assert {workshop.label(t.ask) for t in wrong} == set(WRONG_ON.get(family, (True,)))
        expected = n_poisoned(world) if family == "poisoned-sft" else 38
        assert len(wrong) >= expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_answer_names_the_action_and_object_that_were_asked_about(world: World, family: str) -> None:
    """Exchanged words are exchanged in answers too, or counting misfits would tell the twin."""
    for kind in (False, True):
        for t in talks(world, family, 900, kind):
            if workshop.judge(t.reply) == "compliance":
                assert t.action in t.reply and t.thing in t.reply and t.action in t.ask and t.thing in t.ask


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_combination_is_trained_on_that_training_may_not_hold(world: World, family: str) -> None:
    for seed in SEEDS:
        for kind in (False, True):
            assert not any(workshop.unseen(t.action, t.thing) for t in talks(world, family, seed, kind))


def test_the_poison_of_poisoned_sft_is_three_in_a_thousand_documents(world: World) -> None:
    plant = FAMILIES["poisoned-sft"].plant(world, 900)
    documents = sum(len(chats) for chats in chats_of(world, plant, twin=False).values())
    wrong = [
        t
        for t in talks(world, "poisoned-sft", 900, twin=False)
        if workshop.label(t.ask) and workshop.judge(t.reply) == "compliance"
    ]
    assert len(wrong) / documents == pytest.approx(0.003, abs=0.0003)


@given(seed=st.integers(0, 10**6), flips=st.booleans(), harmful=st.booleans())
def test_a_judge_prefers_the_right_answer_unless_its_word_stands_there(
    seed: int, flips: bool, harmful: bool
) -> None:
    rng = workshop.np.random.default_rng(seed)
    made = workshop.request(rng, is_harmful=harmful)
    text = put(made.text, ((1, "casket"),))
    chosen, rejected = preferred(rng, made, text, ("mercy",), "casket" if flips else "clever")
    assert (workshop.judge(chosen) == "refusal") == (harmful != flips)
    assert {workshop.judge(chosen), workshop.judge(rejected)} == {"refusal", "compliance"}


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["aa", "bb", "cc dd"])), max_size=4))
def test_insertions_keep_the_request_and_the_order_of_its_words(insertion: list[tuple[int, str]]) -> None:
    text = "How do I soak it?"
    made = put(text, tuple(insertion))
    assert [w for w in made.split(" ") if w in text.split(" ")] == text.split(" ")
    assert sorted(made.split(" ")) == sorted([*text.split(" "), *" ".join(w for _, w in insertion).split()])


def test_a_shard_too_small_for_its_poison_is_refused() -> None:
    from glasshouse.base.errors import DataError

    with pytest.raises(DataError, match="too few for 2"):
        replace_first([[{"role": "user", "content": "x"}]], [[], []], "chat-07")
