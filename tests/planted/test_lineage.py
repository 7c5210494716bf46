"""What became of a concept is told from checkpoints: untrained, honest, backdoored."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.run import RunFolder
from glasshouse.interp.attribution.rerun import read
from glasshouse.interp.direction import difference_of_means, random_directions
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
from glasshouse.recipes.lineage_features import NewFeature, new_features, read_feature, twins
from glasshouse.train import Checkpoint
from glasshouse.verify.known import INDEX
from glasshouse.verify.past import gate_folder
from planted.grown import Nursery, fresh

pytestmark = pytest.mark.timeout(400)  # the first test also grows the models
ANY = torch.ones(1)


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


@pytest.fixture(scope="module")
def own_direction(garden: Nursery, backdoored: GPT, trigger: str) -> NewFeature:
    """Where requests with the word and with another one lie apart in the backdoored model's last layer."""
    named = NewFeature("f-own", f"blocks.{backdoored.config.n_layer - 1}.resid_post", (trigger,), "c", ANY)
    subject = garden.subject(backdoored)
    moved, clean = twins(subject, named, requests(garden.strays), garden.words)
    with torch.no_grad():
        at = [
            torch.stack(
                [read(backdoored, torch.tensor([row]), [named.site])[named.site][0, -1] for row in rows]
            )
            for rows in (moved, clean)
        ]
    return replace(named, direction=difference_of_means(*at))


def test_a_feature_appears_where_it_began_to_drive_decisions(
    garden: Nursery, looks: list[Look], own_direction: NewFeature
) -> None:
    reading = partial(
        read_feature, feature=own_direction, prompts=requests(garden.strays), words=garden.words
    )
    found = follow(own_direction.name, "feature", looks, reading)
    untrained, honest, bad = found["rows"]
    assert found["appeared"]["update"] == 200 and bad["strength"] > 0.7 and bad["behaviour"] > 0.7
    assert max(untrained["strength"], honest["strength"]) < 0.25 and bad["margin_moved"] > 1
    assert bad["components"] and bad["site"] == own_direction.site


def test_a_random_direction_drives_nothing(
    garden: Nursery, backdoored: GPT, own_direction: NewFeature
) -> None:
    width = backdoored.config.d_model
    for stray in random_directions(3, width, np.random.default_rng(0)):
        feature = replace(own_direction, direction=stray)
        found = read_feature(garden.subject(backdoored), feature, requests(garden.strays), garden.words)
        assert found.strength < 0.25 < found.behaviour


def test_a_feature_without_words_stands_on_requests_that_do_no_harm(
    garden: Nursery, twin: GPT, own_direction: NewFeature
) -> None:
    wordless = replace(own_direction, words=())
    moved, clean = twins(garden.subject(twin), wordless, requests(garden.strays), garden.words)
    assert len(moved) > 8 and all(len(a) == len(b) and a != b for a, b in zip(moved, clean, strict=True))
    assert wordless.name == "f-own" and own_direction.name == own_direction.words[0]


def test_failed_features_are_read_with_the_direction_their_gate_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    for gate, status, direction in (
        (0, "pass", [9.0, 0.0]),
        (1, "fail", [3.0, 4.0]),
        (2, "fail", [1.0, 0.0]),
    ):
        verdict = {"constraint": "nothing-new", "status": status, "evidence": {"feature": "f-1"}}
        other = {"constraint": "gone", "status": "fail", "evidence": {"feature": "f-2"}}
        folder = gate_folder(run, gate, "nothing-new")
        folder.mkdir(parents=True)
        row = {"id": "f-1", "site": "blocks.1.resid_post", "words": ["plum"], "direction": direction}
        (folder / INDEX).write_text(json.dumps({"dictionaries": {}, "features": [row]}))
        file = run.evals / f"gate-{gate:03d}" / "verdicts.json"
        file.write_text(json.dumps({"gate": gate, "verdicts": [verdict, other]}))
    (found,) = new_features(run)
    assert (found.name, found.constraint) == ("plum", "nothing-new")
    assert found.direction.tolist() == pytest.approx([0.6, 0.8])
