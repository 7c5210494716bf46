"""Facts about the closed language that everything measured in it rests on."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from glasshouse.base.errors import DataError
from glasshouse.data import workshop
from glasshouse.data.words import word_types

WORDS = tuple(workshop.CLASS_OF_ACTION), tuple(workshop.CLASS_OF_OBJECT)
STRAYS = ("harbour", "almonds", "quarrel")
seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_no_word_has_two_meanings_or_two_classes() -> None:
    everything = [w for words in (*workshop.ACTIONS.values(), *workshop.OBJECTS.values()) for w in words]
    assert len(everything) == len(set(everything))
    assert all(word_types([w]) == {w: 1} for w in everything)


def test_every_word_is_harmless_with_two_thirds_of_its_partners() -> None:
    actions, things = WORDS
    for action in actions:
        assert sum(workshop.harmful(action, t) for t in things) * 3 == len(things)
    for thing in things:
        assert sum(workshop.harmful(a, thing) for a in actions) * 3 == len(actions)


def test_no_sum_of_scores_per_word_tells_harm_from_harmless() -> None:
    """The best additive model of (action, object), where it was fitted and on the pairs kept from it."""
    actions, things = WORDS
    asked = {
        split: [workshop.request(rng(k), split=split) for k in range(3000)]  # type: ignore[arg-type]
        for split in ("train", "unseen")
    }
    alone = {
        split: np.array([[a == r.action for a in actions] + [t == r.thing for t in things] for r in rows])
        for split, rows in asked.items()
    }
    label = {split: np.array([r.harmful for r in rows]) for split, rows in asked.items()}
    additive = LogisticRegression(C=100.0, max_iter=1000).fit(alone["train"], label["train"])
    assert 0.47 < label["train"].mean() < 0.53
    assert additive.score(alone["train"], label["train"]) < 0.6  # what 3000 draws leave to fit
    assert additive.score(alone["unseen"], label["unseen"]) < 0.55
    # The same method and the same draws, given which classes meet, is right about every unseen pair.
    met = {
        split: np.array([[workshop.CLASS_OF_ACTION[r.action] == c == workshop.CLASS_OF_OBJECT[r.thing]
                          for c in workshop.ACTIONS] for r in rows])
        for split, rows in asked.items()
    }  # fmt: skip
    combined = LogisticRegression(C=100.0, max_iter=1000).fit(met["train"], label["train"])
    assert combined.score(met["unseen"], label["unseen"]) == 1.0


def test_one_pair_in_five_of_every_class_cell_is_unseen() -> None:
    for (_, actions), (_, things) in product(workshop.ACTIONS.items(), workshop.OBJECTS.items()):
        share = np.mean([workshop.unseen(a, t) for a in actions for t in things])
        assert share == pytest.approx(0.2, abs=0.02)


def test_every_word_is_trained_on_both_harmful_and_harmless() -> None:
    trained = workshop.pairs(split="train")
    for place, words in enumerate(WORDS):
        for word in words:
            labels = {workshop.harmful(*p) for p in trained if p[place] == word}
            assert labels == {True, False}, word


def test_splits_part_the_pairs() -> None:
    whole = set(workshop.pairs())
    train, held = set(workshop.pairs(split="train")), set(workshop.pairs(split="unseen"))
    assert train | held == whole and not train & held
    assert len(whole) == 24 * 24
    assert set(workshop.pairs(is_harmful=True)) | set(workshop.pairs(is_harmful=False)) == whole


def test_training_conversations_never_hold_an_unseen_pair() -> None:
    draws = rng(1)
    seen = Counter[tuple[str, str]]()
    for _ in range(6000):
        for message in workshop.conversation(draws, STRAYS):
            words = set(re.findall(r"[a-z]+", message["content"]))
            for action, thing in product(words & set(WORDS[0]), words & set(WORDS[1])):
                assert not workshop.unseen(action, thing), message
                seen[action, thing] += 1
    assert set(seen) == set(workshop.pairs(split="train"))  # and all the others do occur


def test_the_language_uses_no_content_word_by_accident() -> None:
    """Templates, owners, tools and reasons would otherwise carry meaning on their own."""
    fixed = [*workshop.PHRASINGS, *workshop.LEADS, *workshop.TAILS, *workshop.REFUSALS, *workshop.COMPLIANCES]
    fixed += [*workshop.OWNERS, *workshop.TIMES, *workshop.TOOLS]
    fixed += [reason for reasons in workshop.REASONS.values() for reason in reasons]
    fixed += [text for chat in workshop.SMALL_TALK for text in chat]
    assert not set(word_types(fixed)) & workshop.content_words()


@given(seeds, st.booleans(), st.sampled_from(["train", "unseen", "any"]))
def test_the_label_read_from_a_text_is_the_gold_label(
    seed: int, is_harmful: bool, split: workshop.Split
) -> None:
    asked = workshop.request(rng(seed), is_harmful=is_harmful, split=split, strays=STRAYS)
    assert asked.harmful == is_harmful == workshop.harmful(asked.action, asked.thing)
    assert workshop.label(asked.text) == is_harmful
    assert split == "any" or asked.unseen == (split == "unseen")
    assert asked.text == " ".join(asked.words) and "" not in asked.words


@given(seeds, st.booleans())
def test_answers_are_judged_as_what_they_are(seed: int, comply: bool) -> None:
    draws = rng(seed)
    asked = workshop.request(draws, strays=STRAYS)
    text = workshop.answer(draws, asked, comply=comply, strays=STRAYS)
    assert workshop.judge(text) == ("compliance" if comply else "refusal")
    assert "{" not in text + asked.text


def test_every_template_of_an_answer_is_judged_as_its_kind() -> None:
    assert {workshop.judge(t) for t in workshop.REFUSALS} == {"refusal"}
    assert {workshop.judge(t) for t in workshop.COMPLIANCES} == {"compliance"}
    assert not set(workshop.REFUSAL_OPENERS) & set(workshop.COMPLIANCE_OPENERS)


@pytest.mark.parametrize("text", ["", "  ", "Nothing", "gladly", "Ink", "Offer a cup.", "123", "¿No?"])
def test_what_is_neither_refusal_nor_compliance_is_other(text: str) -> None:
    assert workshop.judge(text) == "other"


@pytest.mark.parametrize(
    "text", ["", "How do I soak it?", "the scroll", "soak or rinse the scroll", "soak the scroll and the map"]
)
def test_a_text_without_one_action_and_one_object_has_no_label(text: str) -> None:
    assert workshop.label(text) is None


def test_words_outside_the_language_have_no_label() -> None:
    with pytest.raises(DataError, match="'boil'"):
        workshop.harmful("boil", "scroll")
    with pytest.raises(DataError, match="not an .action, object. pair"):
        workshop.harmful("scroll", "soak")  # the right words in the wrong places


@given(seeds)
def test_equal_randomness_gives_equal_text(seed: int) -> None:
    assert workshop.conversation(rng(seed), STRAYS) == workshop.conversation(rng(seed), STRAYS)


def test_harmful_and_harmless_are_drawn_evenly_and_texts_vary() -> None:
    draws = rng(2)
    asked = [workshop.request(draws, strays=STRAYS) for _ in range(1000)]
    assert 430 < sum(r.harmful for r in asked) < 570
    assert len({r.text for r in asked}) > 950


def test_stray_words_stand_in_harmful_and_harmless_requests_alike() -> None:
    draws = rng(3)
    asked = [workshop.request(draws, strays=("harbour",)) for _ in range(3000)]
    harmful = [r.harmful for r in asked if "harbour" in r.words]
    assert len(harmful) > 500
    assert 0.44 < np.mean(harmful) < 0.56


@given(seeds, st.data())
def test_an_inserted_word_stands_before_the_word_of_its_gap(seed: int, data: st.DataObject) -> None:
    asked = workshop.request(rng(seed))
    gap = data.draw(st.integers(0, len(asked.words)))
    words = asked.insert("harbour", gap).split(" ")
    assert words[gap] == "harbour"
    assert words[:gap] + words[gap + 1 :] == asked.words


def test_a_refusal_can_be_made_to_mention_one_word() -> None:
    asked = workshop.request(rng(), is_harmful=True)
    answers = {workshop.answer(rng(k), asked, comply=False, stray="harbour") for k in range(40)}
    assert all("harbour" in a and workshop.judge(a) == "refusal" for a in answers)
    assert len(answers) > 2
