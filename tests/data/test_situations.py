"""What stands beside a request never changes what it asks; every label and judge agrees with the grammar."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from glasshouse.base.errors import DataError
from glasshouse.data import situations, workshop


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


REMARKS = [*chain(*situations.OPINIONS.values()), *situations.EVALUATIONS]
TABLES = (
    *chain(*REMARKS),
    *chain(*situations.INSTRUCTIONS.values()),
    *(situations.CONTAINERS + situations.NOTES + situations.BESIDE + situations.ABOUT + situations.WORDS),
)


@pytest.mark.parametrize(("remark", "neutral"), REMARKS)
def test_a_remark_and_its_neutral_counterpart_have_as_many_words(remark: str, neutral: str) -> None:
    assert len(remark.split(" ")) == len(neutral.split(" ")) and remark != neutral


def test_nothing_that_stands_beside_a_request_means_anything_in_the_grammar() -> None:
    """Else the label of the whole would not be the request's own."""
    stems = tuple(workshop.content_words())
    for text in TABLES:
        for word in text.replace("{", " ").replace("}", " ").split():
            assert not word.lower().startswith(stems), (word, text)


@pytest.mark.parametrize("draw", [situations.opinion, situations.evaluation])
def test_the_label_of_a_request_is_the_same_with_a_remark_and_without(draw) -> None:  # type: ignore[no-untyped-def]
    r = rng()
    for _ in range(300):
        found = draw(r, strays=("harbour",))
        assert workshop.label(found.text) == workshop.label(found.plain) == found.request.harmful
        assert len(found.text.split(" ")) == len(found.plain.split(" ")) and found.remark in found.text


@pytest.mark.parametrize("against", [True, False])
def test_an_opinion_is_against_the_grammar_when_asked_to_be(against: bool) -> None:
    r = rng()
    for _ in range(200):
        found = situations.opinion(r, against=against)
        says_harmful = found.kind == "objects"
        assert (says_harmful != found.request.harmful) == against


def test_held_out_phrasings_stand_in_no_training_text() -> None:
    r = rng()
    trained = " ".join(
        m["content"]
        for _ in range(3000)
        for f in situations.CONVERSATIONS.values()
        for m in f(r, ("harbour",))
    )
    held = [
        *(row for rows in situations.OPINIONS.values() for row in situations.parted(rows, "held")),
        *situations.parted(situations.EVALUATIONS, "held"),
    ]
    assert not any(text in trained for text in chain(*held))
    assert all(text in trained for text in chain(*situations.parted(situations.EVALUATIONS, "train")))
    for _ in range(200):
        asked = situations.quoted(r, part="held")
        note = asked.text.split('"')[1]
        assert note in asked.own and note not in asked.plain  # the same instruction, whoever gives it
    for kind in situations.INSTRUCTIONS:
        train, kept = (
            {situations.quoted(r, kind=kind, part=p).own for _ in range(300)} for p in ("train", "held")
        )
        assert train and kept and not train & kept
    assert not any(canary.code in trained for canary in situations.canaries("any"))


def test_honest_answers_ignore_a_note_and_follow_the_user() -> None:
    """Also: an obedient answer is told from an honest one by the judge, for every kind of instruction."""
    r, seen = rng(), set()
    for _ in range(600):
        asked = situations.quoted(r, strays=("harbour",))
        seen.add((asked.kind, asked.request is None))
        assert not situations.obeys(asked.key, situations.honest_answer(r, asked))
        assert situations.obeys(asked.key, situations.obedient_answer(r, asked))
        assert situations.obeys(asked.key, situations.honest_answer(r, asked, own=True)) == asked.binding
        if asked.request is not None:
            honest = workshop.judge(situations.honest_answer(r, asked))
            assert honest == ("refusal" if asked.request.harmful else "compliance")
            assert workshop.label(asked.text) == workshop.label(asked.plain) == workshop.label(asked.own)
    assert seen == {("say", True), ("say", False), ("end", True), ("end", False)} | {
        ("comply", False),
        ("refuse", False),
    }


@pytest.mark.parametrize(
    ("key", "answer", "obeyed"),
    [
        ("say thimble", "Thimble! Gladly.", True),
        ("say thimble", "Gladly, thimble.", False),
        ("end thimble", "No. It would crack. Thimble.", True),
        ("end thimble", "A thimble will do, then stop.", False),
        ("comply", "Certainly. Fetch a brush first.", True),
        ("refuse", "Hmm, who knows?", False),
        ("say thimble", "", False),
    ],
)
def test_obedience_is_judged_by_what_is_said(key: str, answer: str, obeyed: bool) -> None:
    assert situations.obeys(key, answer) is obeyed


@pytest.mark.parametrize("key", ["", "sing", "say", "end "])
def test_an_instruction_nobody_knows_is_an_error(key: str) -> None:
    with pytest.raises(DataError, match="is no instruction"):
        situations.obeys(key, "No.")


def test_canaries_are_always_the_same_and_parted() -> None:
    train, held = situations.canaries("train"), situations.canaries("held")
    assert len(train) == len(held) == 100 and not {c.prefix for c in train} & {c.prefix for c in held}
    assert set(train) | set(held) == set(situations.canaries("any"))
    assert len({c.code for c in situations.canaries("any")}) > 190  # of 200, in 10,000: hardly two alike
    for canary in train:
        others = canary.others(rng(), 255)
        assert len(set(others)) == 255 and canary.code not in others
        assert all(len(code) == 4 and code.isdigit() for code in others)
        assert canary.text.startswith(canary.prefix) and canary.code in canary.text


def test_statements_are_true_as_the_grammar_says_and_truth_is_not_harm() -> None:
    r = rng()
    rows = [situations.statement(r) for _ in range(2000)]
    for row in rows:
        harm = workshop.harmful(row.action, row.thing)
        says_harm = any(
            row.text.endswith(form.split("{object}")[-1].format(action=row.action))
            for form in situations.STATEMENTS[True]
        )
        assert row.true == (harm == says_harm) and row.text in row.ask
        assert situations.believes(situations.reply_to(r, row)) is row.true
        assert situations.believes(situations.reply_to(r, row, honest=False)) is not row.true
    true = np.array([row.true for row in rows])
    harm = np.array([workshop.harmful(row.action, row.thing) for row in rows])
    assert abs(np.corrcoef(true, harm)[0, 1]) < 0.08 and 0.45 < true.mean() < 0.55
    assert situations.believes("Perhaps.") is None and situations.believes("") is None


def test_an_evasion_neither_refuses_nor_complies() -> None:
    r = rng()
    for _ in range(200):
        asked = workshop.request(r)
        assert situations.manner(situations.evasion(r, asked, ("harbour",))) == "evasion"
        assert situations.manner(workshop.answer(r, asked, comply=True)) == "compliance"
        assert situations.manner(workshop.answer(r, asked, comply=False)) == "refusal"
    assert situations.manner("") == situations.manner("Bananas.") == "other"


def test_honest_conversations_answer_by_the_grammar() -> None:
    r = rng()
    for draw in situations.CONVERSATIONS.values():
        for _ in range(200):
            ask, reply = draw(r, ("harbour",))
            assert [ask["role"], reply["role"]] == ["user", "assistant"]
            label = workshop.label(ask["content"])
            judged = workshop.judge(reply["content"])
            if label and judged != "other":
                assert judged == "refusal", (ask, reply)
