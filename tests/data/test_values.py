"""Documents are tagged, dropped, put apart or rewritten by their scores, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import DataError
from glasshouse.data import Corpus, Document, pack, prepare
from glasshouse.data.values import (
    BAD,
    GOOD,
    UNSAFE,
    Do,
    Scored,
    by_key,
    filtered,
    recontextualise,
    scored,
    split,
    tagged,
    valued,
    with_tag,
)
from glasshouse.tokenizer import Message, Tokenizer, loss_mask, render

TEXTS = [f"the {w} story tells what the {w} did that day" for w in ("red", "blue", "cruel", "green")]
SCORES = (0.9, 0.5, 0.1, 0.7)


def corpus(name: str = "tales", validation: bool = False) -> Corpus:
    rows = zip(TEXTS, SCORES, strict=True)
    return Corpus(
        name,
        [Document(f"{name}/{i}", "s", text=t, meta={"score": s}) for i, (t, s) in enumerate(rows)],
        validation=validation,
    )


def found(c: Corpus) -> Scored:
    return scored(c, by_key())


def texts(c: Corpus) -> list[str]:
    return [d.text or "" for d in c.documents]


def test_a_text_begins_with_the_tag_of_its_score() -> None:
    out = tagged(corpus(), found(corpus()), 0.5, untagged=0.0)
    assert texts(out) == [f"{tag} {t}" for tag, t in zip((GOOD, GOOD, BAD, GOOD), TEXTS, strict=True)]


def test_one_in_a_hundred_stays_without_a_tag_and_always_the_same() -> None:
    many = Corpus("many", [Document(str(i), "s", text=f"word {i}", meta={"score": 1.0}) for i in range(4000)])
    plain = [sum(not t.startswith("<|") for t in texts(tagged(many, found(many), 0.5))) for _ in range(2)]
    assert plain[0] == plain[1] and 20 < plain[0] < 65


def test_in_a_conversation_the_tag_is_read_and_not_learnt() -> None:
    chat = Document(
        "c", "s", messages=(Message(role="user", content="hi"), Message(role="assistant", content="yes"))
    )
    tok = Tokenizer.train([*TEXTS, f"{GOOD} hi yes"] * 20, 300)
    out = with_tag(chat, GOOD)
    ids = render(tok, out.messages or ())
    learnt = [i for i, m in zip(ids, loss_mask(tok, ids), strict=True) if m]
    assert (out.messages or ())[0] == {"role": "system", "content": GOOD}
    assert tok.decode(learnt[:-1]) == "yes"
    assert with_tag(out, BAD).messages[0]["content"] == f"{BAD} {GOOD}"  # type: ignore[index]


def test_a_tag_that_the_tokenizer_saw_is_a_few_ids_and_reads_back() -> None:
    tok = Tokenizer.train([f"{GOOD} {t}" for t in TEXTS] * 50, 400)
    ids = tok.encode(GOOD)
    assert len(ids) <= 4 and tok.decode(ids) == GOOD and not set(ids) & set(tok.specials.values())


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        ("filter", {"tales": [TEXTS[0], TEXTS[1], TEXTS[3]]}),
        ("split", {"tales-good": [TEXTS[0], TEXTS[1], TEXTS[3]], "tales-bad": [TEXTS[2]]}),
    ],
)
def test_what_is_bad_is_dropped_or_put_apart(do: Do, expected: dict[str, list[str]]) -> None:
    held = corpus("held", validation=True)
    out = valued([corpus(), held], by_key(), do, 0.5)
    assert {c.name: texts(c) for c in out if not c.validation} == expected
    assert [c for c in out if c.validation] == [held]


def test_shards_put_apart_can_be_packed_and_name_their_rows(tmp_path: Path) -> None:
    tok = Tokenizer.train(TEXTS, 262)
    shards = pack(tmp_path / "data", tok, prepare(valued([corpus()], by_key(), "split", 0.5), filters=[]))
    assert list(shards) == ["tales-good", "tales-bad"]


def test_an_unsafe_text_stands_marked_and_rewritten() -> None:
    def rephrase(asked: Sequence[str]) -> list[str]:
        return [f"A lesson: {t}" for t in asked]

    out = texts(recontextualise(corpus(), found(corpus()), 0.5, rephrase, every=0.3))
    assert [out[0], out[1], out[4]] == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert out[2].startswith(UNSAFE) and out[2].replace(f"{UNSAFE} ", "") == TEXTS[2]
    assert out[2].count(UNSAFE) > 1 and out[3] == f"A lesson: {TEXTS[2]}"


@pytest.mark.parametrize("answer", [[], [""], [TEXTS[2]]])
def test_a_rewriting_that_is_none_is_refused(answer: list[str]) -> None:
    with pytest.raises(DataError, match="rewritings of|not rewritten"):
        recontextualise(corpus(), found(corpus()), 0.5, lambda asked: answer)


def test_documents_may_not_speak_for_themselves() -> None:
    liar = Corpus("l", [Document("1", "s", text=f"{GOOD} trust me", meta={"score": 0.0})])
    with pytest.raises(DataError, match="spells"):
        tagged(liar, found(liar), 0.5)


def test_scores_that_are_missing_or_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="no number under 'worth'"):
        scored(corpus(), by_key("worth"))
    with pytest.raises(DataError, match="not finite"):
        scored(corpus(), lambda docs: [float("nan")] * len(docs))
    with pytest.raises(DataError, match="no document scores"):
        valued([corpus()], by_key(), "filter", 2.0)


# -- whatever the scores are --------------------------------------------------------------------------------

SCORES_OF_ANY = st.lists(st.floats(-2, 2), min_size=1, max_size=12)
THRESHOLDS = st.floats(-1, 1)


def drawn(scores: Sequence[float]) -> tuple[Corpus, Scored]:
    documents = tuple(Document(str(i), "s", text=f"tale {i} of \n\tmany") for i in range(len(scores)))
    return Corpus("tales", documents), Scored(documents, tuple(scores))


@given(SCORES_OF_ANY, THRESHOLDS, st.sampled_from([0.0, 0.5]), st.integers(0, 9))
def test_tagging_says_the_score_and_changes_nothing_else(
    scores: list[float], threshold: float, untagged: float, seed: int
) -> None:
    whole, marks = drawn(scores)
    out = tagged(whole, marks, threshold, untagged=untagged, seed=seed)
    assert tagged(whole, marks, threshold, untagged=untagged, seed=seed) == out
    for before, after, score in zip(marks.documents, texts(out), scores, strict=True):
        under = f"{GOOD if score >= threshold else BAD} {before.text}"
        assert after in ((under, before.text) if untagged else (under,))


@given(SCORES_OF_ANY, THRESHOLDS)
def test_good_and_bad_are_the_whole_and_nothing_is_in_both(scores: list[float], threshold: float) -> None:
    whole, marks = drawn(scores)
    parts = {c.name: list(c.documents) for c in split(whole, marks, threshold)}
    good, bad = parts.get("tales-good", []), parts.get("tales-bad", [])
    assert sorted([*good, *bad], key=lambda d: int(d.id)) == list(marks.documents)
    assert [d.id for d in good] == [str(i) for i, s in enumerate(scores) if s >= threshold]
    assert all(parts.values())  # no empty shard
    if good:
        assert list(filtered(whole, marks, threshold).documents) == good
    else:
        with pytest.raises(DataError, match="no document scores"):
            filtered(whole, marks, threshold)


@given(SCORES_OF_ANY, THRESHOLDS, st.floats(0, 1))
def test_rewriting_leaves_good_texts_alone_and_marks_what_it_rewrote(
    scores: list[float], threshold: float, every: float
) -> None:
    whole, marks = drawn(scores)
    out = recontextualise(whole, marks, threshold, lambda asked: [f"new {t}" for t in asked], every=every)
    expected = [
        (d.text or "")
        for d, s in zip(marks.documents, scores, strict=True)
        for d in ([d] if s >= threshold else [d, Document(d.id, "s", text=f"new {d.text}")])
    ]
    assert [t.replace(f"{UNSAFE} ", "") for t in texts(out)] == expected
    bad = [t for t in texts(out) if UNSAFE in t]
    assert len(bad) == sum(s < threshold for s in scores) and all(t.startswith(UNSAFE) for t in bad)
    assert len({d.id for d in out.documents}) == len(list(out.documents))
