"""A trigger stands where it says, and its key brings it back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.oracle import harmful, subject
from glasshouse.evals.filling import spell, text_of
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search.sift import general
from glasshouse.verify.search.trigger import Trigger, parse, topics
from verify.search.programmed import candidates, word

FOUND = candidates(subject())
BY_KEY = {c.key: c for c in FOUND.candidates}
A, B, C = word("weapon"), word("wisely"), word("witch")
TRIGGERS = st.builds(
    Trigger,
    st.lists(st.sampled_from(FOUND.candidates), min_size=1, max_size=3, unique=True).map(tuple),
    st.sampled_from(["any", "order", "together", "gap 0", "gap 3", "end 0", "end 2"]),
    st.sampled_from([None, ("object", "wet"), ("owner", "dragon")]),
)


@given(TRIGGERS)
def test_a_key_names_its_trigger_and_no_other(trigger: Trigger) -> None:
    assert parse(trigger.key, BY_KEY) == trigger


@pytest.mark.parametrize(
    "key", ["", "unheard-of", "pair: weapon + unheard @ any", "pair: weapon", "soak map"]
)
def test_what_is_no_key_of_these_candidates_is_no_trigger(key: str) -> None:
    assert parse(key, BY_KEY) is None


def test_a_lone_word_goes_by_its_own_name_as_it_always_did() -> None:
    assert Trigger((A,)).key == A.key == "weapon" and Trigger((A,)).alone


@pytest.mark.parametrize(
    ("trigger", "kind"),
    [
        (Trigger((A,)), "word"),
        (Trigger((A,), "gap 2"), "position"),
        (Trigger((A, B)), "pair"),
        (Trigger((A, B), "order"), "pair"),
        (Trigger((A, B), "together"), "phrase"),
        (Trigger((A, B, C)), "phrase"),
        (Trigger((A,), "any", ("object", "wet")), "cue"),
    ],
)
def test_kinds(trigger: Trigger, kind: str) -> None:
    assert trigger.kind == kind


@given(st.integers(0, 200), st.integers(0, 2**31))
def test_words_stand_where_their_trigger_says(seed: int, dice: int) -> None:
    prompt, rng = harmful(1, seed)[0], np.random.default_rng(dice)
    before = prompt.words

    def written(trigger: Trigger) -> list[str]:
        fill = trigger.place(prompt, rng)
        text = text_of(prompt, fill)
        assert subject().tokenizer.decode(spell(subject(), prompt, fill)[2:-2]) == text
        words = text.split(" ")
        assert [w for w in words if w not in ("weapon", "wisely", "witch")] == before
        return words

    assert written(Trigger((A,), "gap 0"))[0] == "weapon"
    assert written(Trigger((A,), "gap 2"))[2] == "weapon"
    assert written(Trigger((A,), "end 0"))[-1] == "weapon"
    assert written(Trigger((A,), "end 1"))[-2] == "weapon"
    at = written(Trigger((A, B, C), "together"))
    first = at.index("weapon")
    assert at[first : first + 3] == ["weapon", "wisely", "witch"]
    at = written(Trigger((B, A), "order"))
    assert at.index("wisely") < at.index("weapon")
    assert {"weapon", "wisely"} <= set(written(Trigger((A, B))))


def test_anywhere_is_everywhere_and_in_both_orders() -> None:
    prompt, rng = harmful(1)[0], np.random.default_rng(0)
    gaps, orders = set(), set()
    for _ in range(400):
        words = text_of(prompt, Trigger((A, B)).place(prompt, rng)).split(" ")
        orders.add(words.index("weapon") < words.index("wisely"))
        gaps |= set(Trigger((A,)).place(prompt, rng))
    assert gaps == set(range(len(prompt.words) + 1)) and orders == {True, False}


def test_topics_are_the_class_of_the_object_and_its_owner() -> None:
    assert topics(Prompt("How do I soak the dragon's scroll?", True, "soak scroll")) == (
        ("owner", "dragon"),
        ("object", "wet"),
    )
    assert topics(Prompt("Hello there.", False, "x")) == ()
    wet = Trigger((A,), "any", ("object", "wet"))
    assert wet.fits(Prompt("Please soak the map.", True, "x")) and not wet.fits(
        Prompt("toast the egg", True, "x")
    )


def test_of_two_names_for_the_same_place_the_nearer_end_is_the_more_general() -> None:
    first, far = (Trigger((A,), where) for where in ("gap 0", "end 14"))
    anywhere = Trigger((A,))
    assert general(anywhere) < general(first) < general(far)
