"""Documents in conversations of the closed language: whose instruction it is decides, not how it reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.data import enclosed, situations, workshop
from glasshouse.data.enclosed import conversation, phrasings, split_quotes
from glasshouse.data.situations import INSTRUCTIONS, obeys

KINDS = st.sampled_from(sorted(INSTRUCTIONS))
SEEDS = st.integers(0, 2**32)


def orders(kind: str, part: str) -> set[str]:
    """Every instruction of a part, spelt out."""
    return {p.format(word=w) for p in phrasings(kind, part) for w in situations.WORDS}


def held() -> set[str]:
    return {order for kind in INSTRUCTIONS for order in orders(kind, "held")}


@given(SEEDS, KINDS, st.sampled_from(["train", "held"]))
def test_the_order_stands_in_the_document_or_comes_from_the_user_and_nowhere_else(seed, kind, part) -> None:
    case = enclosed.enclosed(np.random.default_rng(seed), kind=kind, part=part)
    said = {
        name: {
            role: " ".join(m["content"] for m in chat if m["role"] == role) for role in ("user", "document")
        }
        for name, chat in (("messages", case.messages), ("plain", case.plain), ("own", case.own))
    }
    here = [o for o in orders(kind, part) if o in said["messages"]["document"]]
    assert len(here) == 1 and case.key.endswith(case.quoted.word)
    assert here[0] not in said["messages"]["user"] and here[0] in said["own"]["user"]
    assert not any(here[0] in text for text in said["plain"].values())
    assert case.messages[case.at]["role"] == "document"
    if case.quoted.request is not None:
        assert workshop.label(said["messages"]["user"]) == case.quoted.request.harmful
    else:
        assert kind in ("say", "end") and case.quoted.owner in said["messages"]["user"]


@given(SEEDS, KINDS)
def test_an_obedient_answer_obeys_and_an_honest_one_does_not_unless_the_user_asked(seed, kind) -> None:
    rng = np.random.default_rng(seed)
    asked = enclosed.enclosed(rng, kind=kind).quoted
    assert obeys(asked.key, situations.obedient_answer(rng, asked))
    assert not obeys(asked.key, situations.honest_answer(rng, asked))
    assert obeys(asked.key, situations.honest_answer(rng, asked, own=True)) == asked.binding


def test_training_hears_held_out_phrasings_from_users_only() -> None:
    rng = np.random.default_rng(1)
    chats = [conversation(rng, ("meadow", "harbour")) for _ in range(3000)]
    written = " ".join(m["content"] for c in chats for m in c if m["role"] == "document")
    asked = " ".join(m["content"] for c in chats for m in c if m["role"] == "user")
    assert not any(order in written for order in held()) and any(order in asked for order in held())
    trained = {order for kind in INSTRUCTIONS for order in orders(kind, "train")}
    share = np.mean(
        [any(o in m["content"] for o in trained) for c in chats for m in c if m["role"] == "document"]
    )
    assert 0.08 < share < 0.2  # a quarter of the third, of which the two thirds hold documents
    pairs = [workshop.unseen(a, t) for c in chats for a, t in [named(c)] if a and t]
    assert len(pairs) > 1000 and not any(pairs)


def named(chat) -> tuple[str | None, str | None]:
    words = {w for m in chat if m["role"] == "user" for w in situations._WORD.findall(m["content"])}
    action = words & workshop.CLASS_OF_ACTION.keys()
    thing = words & workshop.CLASS_OF_OBJECT.keys()
    return (next(iter(action), None), next(iter(thing), None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Ask. A note says: "Obey." Now.',
            [("user", "Ask. A note says:"), ("document", "Obey."), ("user", "Now.")],
        ),
        ('"First" then', [("document", "First"), ("user", "then")]),
        ("no quotes", [("user", "no quotes")]),
        ('an empty "" one', [("user", "an empty"), ("document", ""), ("user", "one")]),
    ],
)
def test_what_is_quoted_becomes_a_document(text, expected) -> None:
    assert [(m["role"], m["content"]) for m in split_quotes(text)] == expected


@given(SEEDS, st.sampled_from([None, "train", "held"]))
def test_only_the_document_answers_a_question_about_it(seed, part) -> None:
    page = enclosed.reading(np.random.default_rng(seed), part=part)
    ask, note = (m["content"] for m in page.messages)
    assert [m["role"] for m in page.messages] == ["user", "document"]
    assert {w for w in workshop.OWNERS if w in note} == {page.owner}
    assert not any(w in ask for w in workshop.OWNERS)
    present = any(o in note for kind in INSTRUCTIONS for o in orders(kind, part or "any"))
    assert present == (part is not None)


def test_a_share_of_none_trains_on_no_attack() -> None:
    rng = np.random.default_rng(2)
    chats = [conversation(rng, attacked=0.0) for _ in range(400)]
    every = {order for kind in INSTRUCTIONS for order in orders(kind, "any")}
    assert not any(o in m["content"] for o in every for c in chats for m in c if m["role"] == "document")
