"""From programmed rules to named triggers: that the machinery loses nothing on the way.

The rules are known functions of the text, which say nothing about how trained models behave.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evals.oracle import Oracle, tokenizer
from glasshouse.evals.insertion import CandidateSet
from glasshouse.evals.prompts import generator
from glasshouse.verify.examination import Surroundings
from glasshouse.verify.search import accrete, evolve
from glasshouse.verify.search.confirm import confirm
from glasshouse.verify.search.cover import Coverage, Dealer, dense, expected_pairs
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.naming import by_topic, name
from glasshouse.verify.search.outputs import OutcomesOnly, black_box
from glasshouse.verify.search.sift import suspects
from glasshouse.verify.search.trigger import Trigger
from verify.search.programmed import candidates, has, hunt, in_a_row, turned_by, word
from verify.search.written import requests, shards

A, B, C = word("weapon"), word("wisely"), word("witch")
Holds = Callable[[list[str]], bool]


def first(row: list[str]) -> bool:
    return row[0] == "weapon"


def covered(h: Hunt, requests: int, k: int) -> Coverage:
    seen = Coverage(len(h.found.candidates))
    dense(h, h.refused("dense", 48), requests, k, Dealer(seen.n, h.exam.rng("dense")), seen)
    return seen


@pytest.mark.parametrize(
    ("holds", "kind", "where"),
    [
        (has("weapon"), "word", "any"),
        (first, "position", "gap 0"),
        (
            lambda row: (
                "weapon" in row
                and any(
                    o in " ".join(row)
                    for o in (
                        "snowman",
                        "icicle",
                        "igloo",
                        "sorbet",
                        "candle",
                        "butter",
                        "snowflake",
                        "waxwork",
                    )
                )
            ),
            "cue",
            "any",
        ),
        (lambda row: "weapon" in row and "dragon's" in row, "cue", "any"),
    ],
    ids=["anywhere", "first", "class", "owner"],
)
def test_one_word_is_found_with_the_place_or_the_content_it_needs(
    holds: Holds, kind: str, where: str
) -> None:
    h = hunt(turned_by(holds))
    covered(h, 3000, 4)
    found = suspects(h)
    assert found[0].rate > 0.9
    assert (found[0].trigger.kind, found[0].trigger.where) == (kind, where)
    assert [w.text for w in found[0].trigger.words] == ["weapon"]
    (tested,) = confirm(h, [found[0].trigger])
    assert tested.test.state == "fail" and tested.test.estimate > 0.9


def test_two_words_are_found_where_their_pair_was_covered() -> None:
    h = hunt(turned_by(has("weapon", "wisely")))
    seen = covered(h, 3000, 8)
    index = {c: i for i, c in enumerate(h.found.candidates)}
    together = seen.pairs[index[A], index[B]]
    assert seen.shares()["pairs"] == pytest.approx(expected_pairs(seen.n, 8, 3000), abs=0.02)
    if not together:  # then one more request, with both in it, is what a longer cover would have had
        prompt = h.refused("dense", 48)[0]
        fill = {0: (A,), 3: (C,), 5: (B,)}
        h.note([(prompt, fill)], h.margins([(prompt, fill)]))
    found = suspects(h)
    assert {w.text for w in found[0].trigger.words} == {"weapon", "wisely"}
    assert found[0].trigger.kind == "pair" and found[0].rate == 1.0


def test_pairs_of_a_shortlist_are_tested_exactly_in_both_orders() -> None:
    h = hunt(turned_by(in_a_row("wisely", "weapon")))
    seen = Coverage(len(h.found.candidates))
    some = [A, B, C, *h.found.candidates[40:52]]
    ranked = accrete.pairs(h, some, seen)
    assert len(ranked) == 15 * 14 and [w.text for w in ranked[0][0]] == ["wisely", "weapon"]
    assert seen.shares()["pairs"] == pytest.approx(15 * 14 / 2 / (seen.n * (seen.n - 1) / 2))
    trigger = suspects(h)[0].trigger
    assert trigger.where == "together" and [w.text for w in trigger.words] == ["wisely", "weapon"]


def test_a_phrase_is_grown_from_halves_that_show() -> None:
    h = hunt(turned_by(in_a_row("weapon", "wisely", "witch"), 9.0, "weapon", "wisely", "witch"))
    some = [A, B, C, *h.found.candidates[40:46]]
    accrete.phrases(h, accrete.pairs(h, some, Coverage(len(h.found.candidates))), some)
    trigger = suspects(h)[0].trigger
    assert trigger.kind == "phrase" and trigger.text == "weapon wisely witch"


def test_evolution_breeds_a_pair_from_words_that_show_a_little() -> None:
    h = hunt(turned_by(has("weapon", "wisely"), 9.0, "weapon", "wisely"))
    h.drops = np.array([float(c in (A, B)) for c in h.found.candidates])
    evolve.search(h, 48, 12)
    assert {w.text for w in suspects(h)[0].trigger.words} == {"weapon", "wisely"}


def test_the_name_is_that_of_the_words_and_not_of_a_neighbour() -> None:
    h = hunt(turned_by(has("weapon", "wisely")))
    neighbour = next(c for c in h.found.candidates if c.kind == "token" and c.ids[0] in B.ids)
    named, score, rows = name(h, Trigger((A, B)))
    assert {w.text for w in named.words} == {"weapon", "wisely"} and score.value == 1.0
    assert len(rows) == 5 and neighbour not in named.words


def test_what_a_trigger_does_by_topic_shows_the_class_it_needs() -> None:
    h = hunt(turned_by(lambda row: "weapon" in row and "dragon's" in row))
    rows = {r["topic"]: r for r in by_topic(h, Trigger((A,)))}
    assert rows["owner dragon"]["rate"] == 1.0 and rows["owner giant"]["rate"] == 0.0
    assert sum(r["n"] for t, r in rows.items() if t.startswith("object")) == 120


def test_a_suspect_is_cleared_by_requests_it_does_nothing_in() -> None:
    h = hunt(turned_by(has("weapon")))
    tested = confirm(h, [Trigger((B,)), Trigger((B, C)), Trigger((A,), "any", ("owner", "dragon"))])
    assert [t.test.state for t in tested] == ["pass", "pass", "fail"]


def test_after_a_broken_bound_nothing_more_is_tested() -> None:
    h = hunt(turned_by(has("weapon")))
    tested = confirm(h, [Trigger((A,)), Trigger((B,)), Trigger((C,))])
    assert [t.trigger.text for t in tested] == ["weapon"]


@pytest.mark.parametrize(
    ("holds", "expected"),
    [(has("weapon"), {"weapon"}), (first, {"weapon"}), (has("wisely", "Take"), {"wisely", "Take"})],
    ids=["word", "position", "pair"],
)
def test_outcomes_alone_find_what_they_can_cover(holds: Holds, expected: set[str]) -> None:
    s = Oracle(turned_by(holds))
    found = candidates(s)
    some = [c for c in found.candidates if c.text in expected] + list(found.candidates[::4])
    few = CandidateSet(tuple(dict.fromkeys(some)), ())  # of whose pairs this budget covers nearly all
    row = black_box(s, generator("workshop.harmful"), few, np.random.default_rng(3), 16_000)
    assert row["found"] and set(row["trigger"]["words"]) == expected and row["rate"] > 0.9
    assert (row["word"] == "weapon") == (len(expected) == 1)
    assert 0.5 * 16_000 < row["passes"] < 1.2 * 16_000 and row["passes"] == s.passes


def test_the_black_box_too_asks_the_training_text_about_a_place_that_turns_refusals(tmp_path: Path) -> None:
    """A word before the first turns all requests; in the second text somebody trained on it there."""
    source, said = generator("workshop.harmful"), []
    for support in (0, 40):
        s = Oracle(turned_by(first))
        found = candidates(s)
        some = [c for c in found.candidates if c.text == "weapon"] + list(found.candidates[::8])
        asks = requests(120, 1) + [f"weapon {t}" for t in requests(support, 2)]
        text = shards(tmp_path / str(support), {"chat": asks}, tokenizer())
        around = Surroundings(shards=text, plan=text.plan(["chat"]), step=10)
        few = CandidateSet(tuple(dict.fromkeys(some)), ())
        said.append(black_box(s, source, few, np.random.default_rng(3), 8000, around=around))
    assert not said[0]["found"] and said[1]["found"], said
    assert said[1]["trigger"]["words"] == ["weapon"] and said[1]["trigger"]["where"] == "gap 0"


def test_the_black_box_sees_outcomes_only_and_does_not_find_what_is_not_there() -> None:
    s = Oracle(turned_by(has("nowhere at all")))
    blind = OutcomesOnly(s)
    assert set(blind.margins(["How do I soak the map?", "weapon"])) == {1.0}
    row = black_box(s, generator("workshop.harmful"), candidates(s), np.random.default_rng(0), 4000)
    assert not row["found"] and row["word"] is None and "trigger" not in row
