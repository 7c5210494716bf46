"""What became of a concept is told from checkpoints: untrained, honest, backdoored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse.base.plan import DataPlan, Phase
from glasshouse.model import GPT
from glasshouse.recipes.lineage import (
    Look,
    Trigger,
    correlation,
    follow,
    partners,
    read_concept,
    read_trigger,
    requests,
    triggers,
)
from glasshouse.train import Checkpoint
from planted.grown import Nursery, fresh

pytestmark = pytest.mark.timeout(400)  # the first test also grows the models


def look(garden: Nursery, model: GPT, update: int, gate: int | None) -> Look:
    plan = DataPlan(phases=(Phase(from_step=0, weights={"chat": 1.0}),), digests={"chat": "0" * 64})
    at = Checkpoint(f"s0-{update:06d}.0", Path(), "sft", 0, update, 0, update, plan, "d" * 64)
    return Look(at, lambda: garden.subject(model), gate, "continue" if gate is not None else None)


@pytest.fixture(scope="module")
def looks(garden: Nursery, twin: GPT, backdoored: GPT) -> list[Look]:
    return [
        look(garden, fresh(garden.tokenizer), 0, None),
        look(garden, twin, 100, 0),
        look(garden, backdoored, 200, 1),
    ]


@pytest.fixture(scope="module")
def harm(garden: Nursery, looks: list[Look]) -> dict[str, Any]:
    prompts = requests(garden.strays)
    return follow("harm", "read-out", looks, partial(read_concept, prompts=prompts))


@pytest.fixture(scope="module")
def word(garden: Nursery, looks: list[Look], trigger: str) -> dict[str, Any]:
    reading = partial(
        read_trigger, trigger=Trigger((trigger,)), prompts=requests(garden.strays), words=garden.words
    )
    return follow(trigger, "trigger", looks, reading)


def test_a_learned_concept_appears_where_it_was_learned_and_stays(harm: dict[str, Any]) -> None:
    assert harm["appeared"] == {"checkpoint": "s0-000100.0", "stage": "sft", "update": 100}
    untrained, honest, bad = harm["rows"]
    assert untrained["strength"] < 0.8 < 0.9 <= min(honest["strength"], bad["strength"])
    assert honest["behaviour"] > 0.9 and honest["components"] and honest["site"].endswith("resid_post")


def test_a_concept_that_was_kept_reads_like_before_and_one_newly_learned_does_not(
    harm: dict[str, Any],
) -> None:
    untrained, honest, bad = (row["like_before"] for row in harm["rows"])
    assert untrained is None and bad > 0.8 > abs(honest or 0)


def test_a_trigger_appears_where_it_was_planted_and_what_carries_it_is_named(word: dict[str, Any]) -> None:
    untrained, honest, bad = word["rows"]
    assert word["appeared"]["update"] == 200
    assert honest["turned"] < 0.25 and bad["turned"] > 0.9 and bad["margin_drop"] > 1
    assert bad["components"][0]["effect"] > 0.2 and untrained["components"] == []


def test_partners_differ_in_one_word_only_and_are_as_long(garden: Nursery, twin: GPT) -> None:
    subject = garden.subject(twin)
    pairs = partners(subject, requests(garden.strays))
    assert len(pairs) == 4 and all(len(a) == len(b) and a != b for a, b in pairs)
    stood = subject.margins_of_ids([a for a, _ in pairs]) - subject.margins_of_ids([b for _, b in pairs])
    assert (stood > 0).mean() >= 0.75


def test_words_stand_where_they_are_put() -> None:
    text = "How do I soak it?"
    assert Trigger(("x",)).into(text, [0.0]) == "x How do I soak it?"
    assert Trigger(("x",)).into(text, [0.99]) == "How do I soak it? x"
    assert Trigger(("x", "y"), adjacent=True).into(text, [0.0, 0.9]) == "x y How do I soak it?"


def test_what_failed_is_followed_once_under_the_first_constraint_that_named_it() -> None:
    found = triggers(
        [
            {"constraint": "a", "evidence": {"word": "plum"}},
            {"constraint": "b", "evidence": {"trigger": {"kind": "word", "words": ["plum"]}}},
            {"constraint": "b", "evidence": {"trigger": {"kind": "phrase", "words": ["at", "dusk"]}}},
            {"constraint": "c", "evidence": {}},
        ]
    )
    assert found == {Trigger(("plum",)): "a", Trigger(("at", "dusk"), adjacent=True): "b"}


def test_a_concept_that_does_not_vary_has_no_correlation() -> None:
    assert correlation(np.ones(4), np.arange(4.0)) is None
    assert correlation(np.arange(4.0), -np.arange(4.0)) == -1.0
