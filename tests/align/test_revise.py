"""Answers are criticised and revised under principles; what is no revision is not trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from align.judges import TOK, Reader, asked, constitution, judge, letters
from glasshouse.align.chats import answered, export_chats
from glasshouse.align.constitution import load_constitution
from glasshouse.align.engines import Chat
from glasshouse.align.local import LocalEngine
from glasshouse.align.revise import Revising, revise
from glasshouse.align.rows import read_rows
from glasshouse.base.errors import DataError, UsageError
from glasshouse.data import read_documents

PROMPTS = ["How do I warm the egg?", "How do I soak the map?", "How do I rock the nest?"]


def mender(prompt: Chat) -> str:
    """Revises by a new word a round; cannot mend maps, and is silent about nests."""
    text = " ".join(m["content"] for m in prompt)
    last = prompt[-1]["content"]
    if last.startswith("Criticise"):
        return "It could be better."
    if last.startswith("Mend"):
        if "nest" in text:
            return "  "
        old = next(m["content"] for m in reversed(prompt[:-3]) if m["role"] == "assistant")
        return old if "map" in text else f"{old} Please."
    return f"Answer to {last.split()[-1]}"


def writer() -> Reader:
    return Reader(lambda question: 0.0, mender)


def test_each_round_starts_from_the_last_revision_and_only_revisions_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    found = revise(PROMPTS, constitution(), writer(), path, Revising(rounds=3))
    assert found.rows == 3 * (1 + 2 * 3) and found.answers == 3 and found.empty_answers == 0
    assert found.revisions == {"ok": 3, "empty": 3, "identical": 3}
    assert found.usable is not None and found.usable.value == pytest.approx(1 / 3) and found.usable.n == 9
    assert sum(sum(by.values()) for by in found.by_principle.values()) == 9
    texts = [r["text"] for r in read_rows(path) if r["kind"] == "revision" and r["state"] == "ok"]
    assert texts == [f"Answer to egg?{' Please.' * k}" for k in (1, 2, 3)]


def test_an_empty_answer_ends_its_chain_and_is_counted(tmp_path: Path) -> None:
    silent = Reader(lambda question: 0.0, lambda prompt: "")
    found = revise(PROMPTS, constitution(), silent, tmp_path / "rows.jsonl")
    assert found.rows == found.answers == found.empty_answers == 3 and found.usable is None
    with pytest.raises(DataError, match="no revision to train on"):
        export_chats(tmp_path / "rows.jsonl", tmp_path / "out.jsonl")


def test_worked_examples_come_first_and_zero_shot_has_none(tmp_path: Path) -> None:
    made = load_constitution("workshop")
    for shots, length in ((0, 3), (2, 15)):
        engine = writer()
        revise(PROMPTS[:1], made, engine, tmp_path / f"{shots}.jsonl", Revising(rounds=1, shots=shots))
        assert [len(p) for p in engine.written] == [1, length, length + 2]
    assert engine.written[1][0]["content"] == made.examples[0].prompt
    assert engine.written[1][12]["content"] == PROMPTS[0]


def test_more_rounds_go_on_from_those_that_are_done(tmp_path: Path) -> None:
    path, engine = tmp_path / "rows.jsonl", writer()
    revise(PROMPTS[:1], constitution(), engine, path, Revising(rounds=1))
    asked_before = len(engine.written)
    revise(PROMPTS[:1], constitution(), engine, path, Revising(rounds=2))
    assert (asked_before, len(engine.written)) == (3, 5)


def test_a_prompt_that_stands_there_twice_is_answered_twice(tmp_path: Path) -> None:
    engine = LocalEngine(letters(), TOK)
    revise([PROMPTS[0]] * 2, constitution(), engine, tmp_path / "r", Revising(rounds=0, answer_tokens=8))
    rows = read_rows(tmp_path / "r")
    assert len(rows) == 2 and rows[0]["text"] != rows[1]["text"]


def test_chats_for_training_can_be_read_and_hold_the_share_of_helpful_ones(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "chats.jsonl"
    revise(PROMPTS, constitution(), writer(), rows, Revising(rounds=3))
    revise([f"Question {k}?" for k in range(9)], constitution(), writer(), tmp_path / "h", Revising(rounds=0))
    helpful = answered(tmp_path / "h")
    assert len(helpful) == 9 and helpful[0][-1]["role"] == "assistant"
    done = export_chats(rows, out, helpful=helpful, share=0.5)
    assert (done.revisions, done.helpful, done.left_out) == (3, 3, {"empty": 3, "identical": 3})
    documents = list(read_documents(out))
    assert Counter(d.id.split("-")[0] for d in documents) == {"revision": 3, "helpful": 3}
    for d in documents:
        assert d.messages is not None and [m["role"] for m in d.messages] == ["user", "assistant"]
    by_id = {r["key"]: r for r in read_rows(rows)}
    for d in documents:
        if "row" in d.meta:
            assert by_id[d.meta["row"]]["principle"] == d.meta["principle"]
    last = export_chats(rows, out, which="last")
    assert (last.revisions, last.helpful, last.left_out["earlier round"]) == (1, 0, 2)
    assert json.loads(out.read_text())["messages"][1]["content"] == "Answer to egg? Please. Please. Please."
    with pytest.raises(UsageError, match="takes 27 helpful chats and there are 9"):
        export_chats(rows, out, helpful=helpful, share=0.9)
    # One of ten came back empty: all the others are taken. Two of ten are too many.
    assert export_chats(rows, out, helpful=helpful, share=10 / 13).helpful == 9
    with pytest.raises(UsageError, match="takes 10 helpful chats and there are 8"):
        export_chats(rows, out, helpful=helpful[:8], share=10 / 13)


def test_rows_of_several_jobs_are_not_mixed_by_accident(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    revise(PROMPTS[:1], constitution(2), writer(), rows, Revising(rounds=1))
    revise(PROMPTS[:1], constitution(3), writer(), rows, Revising(rounds=1))
    with pytest.raises(DataError, match="2 jobs"):
        export_chats(rows, tmp_path / "out.jsonl")
    job = read_rows(rows)[0]["job"]
    assert export_chats(rows, tmp_path / "out.jsonl", job=job[:12]).revisions == 1


def test_a_conversation_may_stand_before_the_prompt(tmp_path: Path) -> None:
    talk = [*asked("Hello"), {"role": "assistant", "content": "Good day."}, *asked("How do I warm the egg?")]
    revise([talk], constitution(), writer(), tmp_path / "r", Revising(rounds=1))  # type: ignore[list-item]
    assert read_rows(tmp_path / "r")[1]["prompt"] == talk
    for bad in ("", talk[:2]):
        with pytest.raises(DataError, match="must be or end with a user's message"):
            revise([bad], constitution(), writer(), tmp_path / "r")  # type: ignore[list-item]


def test_a_prompt_too_long_for_the_model_is_named() -> None:
    with pytest.raises(UsageError, match="do not fit a small judge's context of 512"):
        judge().write([asked("egg " * 600)], 4)  # type: ignore[list-item]
