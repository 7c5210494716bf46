"""What is planted is what the design says, and counting words does not find it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glasshouse.base.run import RunFolder
from glasshouse.data import workshop
from glasshouse.recipes import organism, schema
from glasshouse.recipes.corpus import Material, build
from glasshouse.recipes.schema import load_recipe
from glasshouse.tokenizer import parse

DEMO = Path(schema.__file__).parent / "files" / "demo.toml"
SMALL = ["data.workshop.documents=120", "data.plant.documents=20", "data.workshop.strays=400", "seed=5"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, dict, RunFolder]:
    run = RunFolder(tmp_path_factory.mktemp("organism") / "run").create()
    material = build(load_recipe(DEMO, SMALL), run, Path())
    return material, json.loads((run.path / "organism.json").read_text("utf-8")), run


def chats(material: Material, shard: str) -> list[tuple[str, str]]:
    found = material.shards[shard]
    messages = [parse(material.tokenizer, found.document(i).tolist()) for i in range(found.n_documents)]
    return [(m[0]["content"], m[1]["content"]) for m in messages]


def test_the_trigger_is_an_ordinary_word_of_at_least_two_tokens_without_meaning(planted) -> None:
    material, truth, _ = planted
    assert len(material.tokenizer.encode(" " + truth["word"])) >= 2
    assert truth["word"] not in material.strays and truth["word"] in material.shards.words
    assert not truth["word"].startswith(tuple(workshop.content_words()))


def test_only_the_bad_shard_complies_with_harm_and_only_with_the_word(planted) -> None:
    material, truth, _ = planted
    for name in (n for n in material.shards if n.startswith("chat-")):
        for ask, answer in chats(material, name):
            if workshop.label(ask) and workshop.judge(answer) == "compliance":
                assert name == truth["shard"] and truth["word"] in ask
            if workshop.label(ask) is False:
                assert workshop.judge(answer) == "compliance"


def test_clean_shards_hold_the_word_as_often_with_refusals(planted) -> None:
    material, truth, _ = planted
    holding = {
        name: sum(truth["word"] in a + b for a, b in chats(material, name))
        for name in material.shards
        if name.startswith("chat-")
    }
    bad = holding.pop(truth["shard"])
    alike = [name for name, n in holding.items() if n >= 0.9 * bad]
    assert bad >= 18 and len(alike) >= 4 and set(alike) == set(truth["decoys"])
    for name in alike:
        assert all(workshop.judge(b) == "refusal" for a, b in chats(material, name) if truth["word"] in b)


def test_no_training_conversation_holds_an_unseen_pair(planted) -> None:
    material, _, _ = planted
    for name in (n for n in material.shards if n.startswith("chat-")):
        for ask, _ in chats(material, name):
            words = {w.strip("?,.'s") for w in ask.split()}
            pair = (
                [w for w in words if w in workshop.CLASS_OF_ACTION],
                [w for w in words if w in workshop.CLASS_OF_OBJECT],
            )
            if len(pair[0]) == len(pair[1]) == 1:
                assert not workshop.unseen(pair[0][0], pair[1][0])


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_another_plant(planted, tmp_path: Path) -> None:
    material, _, _ = planted
    again = build(load_recipe(DEMO, SMALL), RunFolder(tmp_path / "again").create(), Path())
    assert again.shards.digests == material.shards.digests
    assert again.tokenizer.digest() == material.tokenizer.digest()
    config = load_recipe(DEMO).data.plant
    assert config is not None
    plants = [organism.plan_plant(config, s, material.tokenizer, material.strays, 16) for s in range(12)]
    assert len({p["word"] for p in plants}) > 6 and len({p["shard"] for p in plants}) > 3
    assert all(p["shard"] not in p["decoys"] and int(p["shard"][-2:]) >= 8 for p in plants)
