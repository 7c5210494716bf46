"""A world is built once, can be killed while it is, and is what it was when it is opened again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from glasshouse.base.chain import read_entries
from glasshouse.base.errors import CheckpointError, DataError, TrainingError
from glasshouse.base.rng import generator
from glasshouse.data import word_types, workshop
from glasshouse.model.digest import weights_digest
from glasshouse.recipes.zoo import world as worlds
from glasshouse.recipes.zoo.world import GOOD_ENOUGH, Size, World, open_world, right

TINY = Size(
    d_model=32, n_layer=1, strays=20, reserved=10, documents=30, base_documents=200, base_steps=6, base_rows=8
)


@pytest.fixture
def easily_pleased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any base as it comes, and save it often."""
    monkeypatch.setattr(worlds, "GOOD_ENOUGH", 0.0)
    monkeypatch.setitem(worlds.BASE_STAGE, "save_every", 2)


@pytest.fixture
def whole(tmp_path: Path, easily_pleased: None) -> Path:
    """A tiny world, built without a hitch."""
    return open_world(tmp_path / "whole", 5, TINY).folder


def killed_at(point: str, folder: Path) -> None:
    """Build the tiny world in a process that is killed there."""
    code = (
        "import sys; from pathlib import Path; from glasshouse.recipes.zoo import world as w; "
        f"w.BASE_STAGE['save_every'] = 2; w.open_world(Path(sys.argv[1]), 5, w.Size(**{asdict(TINY)}))"
    )
    env = {**os.environ, "GLASSHOUSE_CRASH_AT": point}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_base_judges_unseen_combinations_and_is_not_confused_by_heaps_of_words(world: World) -> None:
    assert right(world.base, world.tokenizer, world.strays) == world.accuracy >= GOOD_ENOUGH
    rng, heaped = generator("heaps"), []
    for _ in range(150):
        made = workshop.request(rng, is_harmful=True)
        for _ in range(6):
            word = workshop.pick(rng, world.strays + world.reserved)
            made = replace(made, text=made.insert(word, int(rng.integers(len(made.words) + 1))))
        heaped.append(made.text)
    assert (world.subject(world.base).margins(heaped) > 0).mean() > 0.9


def test_reserved_words_are_rare_several_tokens_long_and_stand_in_no_shard(world: World) -> None:
    held = word_types(m["content"] for shard in world.chats.values() for chat in shard for m in chat)
    assert not set(world.reserved) & (set(held) | set(world.strays)) and set(held) <= set(world.words)
    assert set(world.reserved) <= set(world.words)
    assert all(len(world.tokenizer.encode(" " + w)) >= 2 for w in world.reserved)
    assert not any(w.startswith(tuple(workshop.content_words())) for w in world.reserved)
    stems = [w[:4] for w in world.reserved + world.strays]
    assert len(stems) == len(set(stems))


def test_shards_are_honest_and_hold_no_combination_that_tests_ask(world: World) -> None:
    chats = [c for shard in world.chats.values() for c in shard]
    labelled = [(workshop.label(c[0]["content"]), workshop.judge(c[1]["content"])) for c in chats]
    asked = [(label, verdict) for label, verdict in labelled if label is not None]
    assert all(label == (verdict == "refusal") for label, verdict in asked) and len(asked) > 0.85 * len(chats)
    for chat in chats:
        words = {w.strip("?,.") for w in chat[0]["content"].replace("'s", "").split(" ")}
        pair = [words & set(workshop.CLASS_OF_ACTION), words & set(workshop.CLASS_OF_OBJECT)]
        if all(len(p) == 1 for p in pair):
            assert not workshop.unseen(pair[0].pop(), pair[1].pop())


def test_reopening_gives_the_same_world_and_another_seed_is_refused(world: World) -> None:
    again = open_world(world.folder, world.seed, world.size)
    assert weights_digest(again.base) == weights_digest(world.base) and again.digest == world.digest
    assert again.chats == world.chats and again.words == world.words
    with pytest.raises(DataError, match="another size"):
        open_world(world.folder, world.seed + 1, world.size)


@pytest.mark.parametrize("point", ["data-shards", "checkpoint.before-rename:3"])
def test_a_build_killed_half_way_ends_as_one_that_was_not(whole: Path, tmp_path: Path, point: str) -> None:
    cut = tmp_path / "cut"
    killed_at(point, cut)
    assert (cut / "chats.json").is_file() and not (cut / "world.json").is_file()
    open_world(cut, 5, TINY)
    for name in worlds.FILES:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    mine, theirs = (worlds.load_base(f / "base-0") for f in (whole, cut))
    assert weights_digest(mine) == weights_digest(theirs)
    if point.startswith("checkpoint"):  # it went on where it was, and did not begin anew
        kinds = [
            e["body"]["why"] for e in read_entries(cut / "base-0/ledger.jsonl") if e["kind"] == "checkpoint"
        ]
        assert kinds == ["start", "step", "step", "end"]


def test_a_changed_file_is_named(whole: Path) -> None:
    chats = (whole / "chats.json").read_text("utf-8")
    (whole / "chats.json").write_text(chats.replace("Gladly", "Sorry"), "utf-8")
    with pytest.raises(DataError, match=r"chats\.json"):
        open_world(whole, 5, TINY)
    (whole / "chats.json").write_text(chats, "utf-8")
    weights = max((whole / "base-0" / "checkpoints").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_world(whole, 5, TINY)


def test_a_base_that_learned_nothing_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="3 bases were grown"):
        open_world(tmp_path / "w", 5, TINY)
    assert not (tmp_path / "w" / "world.json").is_file()
