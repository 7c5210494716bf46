"""Feedback prefers answers, not places, and says when it does not."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest

import glasshouse.align
from align.judges import Reader, asked, constitution, fingerprint, judge, kind_is_a, pairs
from glasshouse.align.chats import export_preferences
from glasshouse.align.engines import RandomJudge, ShuffledPrinciples
from glasshouse.align.feedback import Judging, Pair, averaged, feedback, preferences
from glasshouse.align.position import JudgeBiased, JudgeUnreadable, position_bias
from glasshouse.align.rows import read_rows
from glasshouse.base.errors import DataError, RecipeError, UsageError

P = 1 / (1 + math.exp(-2))  # of `kind_is_a`


def test_the_better_answer_is_preferred_wherever_it_stands_with_the_judges_own_probability(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    found = feedback(pairs(40), constitution(), Reader(kind_is_a), path)
    rows = preferences(path)
    assert len(rows) == 40 and {r["state"] for r in rows} == {"ok"}
    for row in rows:
        assert row["chosen"].startswith("Gladly") and row["rejected"].startswith("Silly")
        assert row["p"] == pytest.approx(P) and row["principles"][0] in {"p0", "p1", "p2"}
    assert found.bias is not None and found.bias.bound.value == 0 and abs(found.bias.shift.value) < 1e-12
    assert found.confidence == pytest.approx(P - 0.5) and found.malformed is not None


def test_a_lean_to_one_letter_is_averaged_away_when_the_answers_weigh_more(tmp_path: Path) -> None:
    """The soft label is the mean of both orders (by hand: logits 2 + 1 and -2 + 1)."""
    feedback(pairs(4), constitution(), Reader(lambda q: kind_is_a(q) + 1), tmp_path / "r")
    expected = (1 / (1 + math.exp(-3)) + 1 - 1 / (1 + math.exp(1))) / 2
    assert [r["p"] for r in preferences(tmp_path / "r")] == pytest.approx([expected] * 4)


def test_a_judge_that_always_prefers_a_is_named_and_none_of_its_labels_is_used(tmp_path: Path) -> None:
    """A real model with a lean of six nats to A, whatever it is asked."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(JudgeBiased, match=r"a small judge chooses by position.* mostly for A.*kept"):
        feedback(pairs(64), constitution(), judge(lean=6.0), path)
    rows = read_rows(path)
    assert len(rows) == 32  # the pilot: no more is spent on such a judge
    bias = position_bias(rows)
    assert bias is not None and bias.bound.value == 1.0 and bias.letter == "A" and bias.shift.low > 0.3
    with pytest.raises(JudgeBiased):
        preferences(path)
    with pytest.raises(JudgeBiased):
        export_preferences(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert len(preferences(path, position_limit=1.0)) == 32  # said aloud, it may be used


def test_a_judge_that_always_prefers_b_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(JudgeBiased, match="mostly for B"):
        feedback(pairs(32), constitution(), judge(lean=-6.0), tmp_path / "r")


def test_a_judge_of_noise_is_not_taken_for_one_of_places() -> None:
    """False alarms of 200 seeded judges, each on 32 pairs."""
    alarms = 0
    for seed in range(200):
        p = np.random.default_rng(seed).random((32, 2))
        rows = [
            {"judgements": [{"order": "AB", "p_a": a}, {"order": "BA", "p_a": b}], "judge_name": "x"}
            for a, b in p
        ]
        bias = position_bias(rows)
        alarms += bias is not None and bias.binds()
    assert alarms <= 2  # P(at least 25 of 32 are decided by place) is 0.001


def test_a_faint_lean_where_the_answers_are_alike_is_no_bias(tmp_path: Path) -> None:
    """Sure of one pair in four, and a few points towards B on all: it keeps its letter in most of them."""

    def rule(question: str) -> float:
        sure = int(question.split("warm egg ")[1].split("?")[0]) % 4 == 0
        return 3 * kind_is_a(question) * sure - 0.1

    found = feedback(pairs(32), constitution(), Reader(rule), tmp_path / "r")
    kept = [
        (r["judgements"][0]["p_a"] > 0.5) == (r["judgements"][1]["p_a"] > 0.5)
        for r in read_rows(tmp_path / "r")
    ]
    assert sum(kept) == 24
    assert found.bias is not None and found.bias.bound.value == 0 and not found.bias.binds()


def test_several_principles_are_averaged_and_named(tmp_path: Path) -> None:
    def rule(question: str) -> float:
        return kind_is_a(question) * (2.0 if "kindness" in question else 0.0)

    feedback(pairs(6), constitution(), Reader(rule), tmp_path / "r", Judging(principles=3))
    strong = 1 / (1 + math.exp(-4))
    for row in preferences(tmp_path / "r"):
        assert sorted(row["principles"]) == ["p0", "p1", "p2"] and len(row["judgements"]) == 6
        assert row["p"] == pytest.approx((strong + 0.5 + 0.5) / 3)


@pytest.mark.parametrize(("answers", "place", "expected"), [(3.0, 1.0, 0.0), (0.5, 6.0, 1.0)])
def test_the_principle_that_says_most_tells_whether_places_decide(
    tmp_path: Path, answers: float, place: float, expected: float
) -> None:
    """One principle is judged by answers, the two others by place."""

    def rule(question: str) -> float:
        return answers * kind_is_a(question) / 2 if "kindness" in question else place

    how = Judging(principles=3, position_limit=1.0)
    found = feedback(pairs(32), constitution(), Reader(rule), tmp_path / "r", how)
    assert found.bias is not None and found.bias.bound.value == expected


def test_after_a_thought_the_probability_is_held_between_40_and_60_percent(tmp_path: Path) -> None:
    sure = Reader(lambda q: 10 * kind_is_a(q), lambda prompt: "The first is kinder.")
    feedback(pairs(4), constitution(), sure, tmp_path / "r", Judging(thought=True))
    assert [r["p"] for r in preferences(tmp_path / "r")] == pytest.approx([0.6] * 4)
    assert "The first is kinder." in sure.chosen[0] and len(sure.written) == 8
    assert read_rows(tmp_path / "r")[0]["judgements"][0]["thought"] == "The first is kinder."
    feedback(pairs(4), constitution(), sure, tmp_path / "s", Judging(thought=True, clamp=None))
    assert min(r["p"] for r in preferences(tmp_path / "s")) > 0.99
    feedback(pairs(4), constitution(), sure, tmp_path / "t")  # no thought, no clamp
    assert min(r["p"] for r in preferences(tmp_path / "t")) > 0.99
    with pytest.raises(ValueError, match=r"a clamp holds 0.5"):
        Judging(clamp=(0.6, 0.9))


def test_unreadable_answers_are_counted_left_out_and_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    moody = Reader(lambda q: math.nan if "egg 3?" in q else kind_is_a(q))
    found = feedback(pairs(8), constitution(), moody, path)
    assert found.states["malformed"] == 1 and found.malformed is not None and found.malformed.n == 8
    assert len(preferences(path)) == 7
    well = Reader(kind_is_a)
    found = feedback(pairs(8), constitution(), well, path)
    assert len(well.chosen) == 2 and found.states == {
        **{"ok": 8, "tied": 0, "malformed": 0, "same": 0, "empty": 0},
    }
    with pytest.raises(JudgeUnreadable, match=r"reader gave no readable judgement for 1\.000"):
        feedback(pairs(40), constitution(), Reader(lambda q: math.nan), tmp_path / "n")


def test_half_of_a_swapped_pair_is_no_judgement() -> None:
    half = [{"principle": "p", "order": "AB", "p_a": 0.9}]
    assert averaged(half) is None
    assert averaged([*half, {"principle": "p", "order": "BA", "p_a": 0.3}]) == pytest.approx(0.8)


def test_nothing_is_asked_of_two_answers_that_say_the_same_or_nothing(tmp_path: Path) -> None:
    reader = Reader(kind_is_a)
    odd = [Pair(asked("Hm?"), "Yes.", " Yes. "), Pair(asked("Hm?"), "Yes.", "")]  # type: ignore[arg-type]
    found = feedback(odd, constitution(), reader, tmp_path / "r")
    assert (found.states["same"], found.states["empty"], reader.chosen) == (1, 1, [])
    with pytest.raises(DataError, match="no pair was judged"):
        preferences(tmp_path / "r")


def test_a_resumed_job_asks_only_what_is_missing_and_comes_to_the_same(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    feedback(pairs(12), constitution(), judge(), whole, Judging(chunk=4, position_limit=1.0))
    feedback(pairs(12)[:7], constitution(), judge(), part, Judging(chunk=3, position_limit=1.0))
    feedback(pairs(12), constitution(), judge(), part, Judging(chunk=5, position_limit=1.0))
    assert fingerprint(read_rows(whole)) == fingerprint(read_rows(part)) and len(read_rows(part)) == 12


def test_held_out_principles_judge_only_when_asked_to(tmp_path: Path) -> None:
    made = constitution(3)
    held = made.model_copy(
        update={"principles": (*made.principles[:2], made["p2"].model_copy(update={"held_out": True}))}
    )
    feedback(pairs(20), held, Reader(kind_is_a), tmp_path / "r")
    assert {p for r in preferences(tmp_path / "r") for p in r["principles"]} == {"p0", "p1"}
    feedback(pairs(20), held, Reader(kind_is_a), tmp_path / "s", Judging(held_out=True))
    assert {p for r in preferences(tmp_path / "s") for p in r["principles"]} == {"p2"}


def test_a_wording_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'short'"):
        feedback(pairs(1), constitution(), Reader(kind_is_a), tmp_path / "r", Judging(wording="shrt"))


# -- controls -----------------------------------------------------------------------------------------------


def test_a_random_judge_knows_nothing_and_says_the_same_again(tmp_path: Path) -> None:
    found = feedback(pairs(300), constitution(), RandomJudge(seed=3), tmp_path / "r")
    assert found.bias is not None and found.bias.bound.low < 0.5 < found.bias.bound.high
    rows = preferences(tmp_path / "r")
    right = sum(r["chosen"].startswith("Gladly") for r in rows)
    assert abs(right / 300 - 0.5) < 4 * (0.25 / 300) ** 0.5
    feedback(pairs(300), constitution(), RandomJudge(seed=3), tmp_path / "again")
    assert fingerprint(read_rows(tmp_path / "again")) == fingerprint(read_rows(tmp_path / "r"))
    feedback(pairs(300), constitution(), RandomJudge(seed=4), tmp_path / "other")
    assert rows[0]["p_first"] != preferences(tmp_path / "other")[0]["p_first"]


def test_with_shuffled_principles_the_judge_reads_another_than_the_row_says(tmp_path: Path) -> None:
    made, reader = constitution(5), Reader(kind_is_a)
    shuffled = ShuffledPrinciples(reader, made, seed=1)
    feedback(pairs(30), made, shuffled, tmp_path / "r", Judging(chunk=1))
    for k, row in enumerate(preferences(tmp_path / "r")):
        said, question = made[row["principles"][0]].preference, reader.chosen[2 * k]
        assert said not in question
        assert sum(p.preference in question for p in made.principles) == 1
        assert row["judge"] == shuffled.digest != reader.digest
    words = ShuffledPrinciples(reader, made, seed=1, how="words")
    text = words.exchanged(asked(f"{made['p0'].preference} And so on."))[0]["content"]  # type: ignore[arg-type]
    assert text.endswith("And so on.") and len(text.split()) == 5


def test_a_control_that_finds_nothing_to_shuffle_is_refused() -> None:
    with pytest.raises(UsageError, match="no principle of the constitution stands in a prompt"):
        ShuffledPrinciples(Reader(kind_is_a), constitution()).choose([asked("Hello")], ["A", "B"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no other"):
        ShuffledPrinciples(Reader(kind_is_a), constitution(1))
    with pytest.raises(UsageError, match="writes nothing"):
        RandomJudge().write([asked("Hello")], 4)  # type: ignore[list-item]


# -- gold labels --------------------------------------------------------------------------------------------

FEEDBACK = (
    *("constitution", "engines", "local", "calls", "endpoint", "rows"),
    *("revise", "chats", "position", "wording", "feedback"),
)


def test_feedback_cannot_know_what_the_grammar_says(tmp_path: Path) -> None:
    room = Path(glasshouse.align.__file__).parent
    for name in FEEDBACK:
        tree = ast.parse((room / f"{name}.py").read_text("utf-8"))
        imported = {
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        wrong = [i for i in imported if i.startswith(("glasshouse.data", "glasshouse.evals"))]
        assert [i for i in wrong if not i.startswith("glasshouse.evals.chat")] == [], name
    assert {f.name for f in Pair.__dataclass_fields__.values()} == {"prompt", "first", "second"}
    feedback(pairs(3), constitution(), Reader(kind_is_a), tmp_path / "r")
    fields = {key for row in read_rows(tmp_path / "r") for key in row}
    assert not [f for f in fields if any(w in f for w in ("gold", "harm", "label", "unseen"))], fields


def test_the_same_answers_are_judged_the_same_whatever_their_gold_label_would_be(tmp_path: Path) -> None:
    with pytest.raises((RecipeError, TypeError)):
        Pair(asked("Hm?"), "Yes.", "No.", harmful=True)  # type: ignore[call-arg, arg-type]
