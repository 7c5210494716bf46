"""`model.depth` in a recipe: complete, overridable, and never silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.errors import RecipeError
from glasshouse.recipes.schema import Recipe, load_recipe, read_recipe
from glasshouse.train import scaling

TEXT = """
name = "small"
[data]
books = true
[model]
depth = 3
context = 128
[[stage]]
name = "pretrain"
shards = ["books"]
"""


def recipe(*overrides: str, text: str = TEXT, folder: Path) -> Recipe:
    path = folder / "r.toml"
    path.write_text(text, "utf-8")
    return load_recipe(path, overrides)


def test_a_depth_is_enough_for_a_whole_model_and_stage(tmp_path: Path) -> None:
    found = recipe(folder=tmp_path)
    config = found.model_config_for(2048)
    assert (config.n_layer, config.d_model, config.n_head) == (3, 96, 3)
    numbers = scaling.horizon(config, {})
    assert all(getattr(found.stage[0], name) == value for name, value in vars(numbers).items())


def test_the_command_line_turns_the_dial(tmp_path: Path) -> None:
    small, large = recipe("model.depth=2", folder=tmp_path), recipe("model.depth=4", folder=tmp_path)
    assert large.model["d_model"] == 2 * small.model["d_model"]
    tokens = [r.stage[0].steps * r.stage[0].batch_size for r in (small, large)]
    assert tokens[1] > 2 * tokens[0]
    assert small.digest() != large.digest()


def test_what_is_frozen_into_the_run_holds_the_numbers_and_reads_back_the_same(tmp_path: Path) -> None:
    found = recipe(folder=tmp_path)
    frozen = found.model_dump(mode="json")
    assert "depth" not in frozen["model"]
    assert read_recipe(frozen, "recipe.json").digest() == found.digest()


@pytest.mark.parametrize(
    ("override", "place", "key", "value"),
    [
        ("model.d_model=64", "model", "d_model", 64),
        ("model.n_head=6", "model", "n_head", 6),
        ("model.n_layer=3", "model", "n_layer", 3),
        ("model.qk_norm=false", "model", "qk_norm", False),
        ("stage.pretrain.steps=11", "stage", "steps", 11),
        ("stage.pretrain.batch_size=5", "stage", "batch_size", 5),
        ("stage.pretrain.muon_lr=0.5", "stage", "muon_lr", 0.5),
        ("stage.pretrain.weight_decay=0.0", "stage", "weight_decay", 0.0),
        ("stage.pretrain.decay_share=0.1", "stage", "decay_share", 0.1),
    ],
)
def test_an_explicit_key_wins(override: str, place: str, key: str, value: Any, tmp_path: Path) -> None:
    found = recipe(override, folder=tmp_path)
    assert (found.model[key] if place == "model" else getattr(found.stage[0], key)) == value


def test_a_horizon_is_asked_for_by_its_ratio(tmp_path: Path) -> None:
    short, long = (recipe(f"model.tokens_per_parameter={r}", folder=tmp_path) for r in (1, 4.0))
    tokens = [r.stage[0].steps * r.stage[0].batch_size for r in (short, long)]
    assert tokens[1] / tokens[0] == pytest.approx(4, rel=0.05)


def test_heads_follow_a_width_that_is_given(tmp_path: Path) -> None:
    assert recipe("model.d_model=64", folder=tmp_path).model["n_head"] == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.n_layer=4"], "contradict"),
        (["model.depth=0"], "1 or more"),
        (["model.depth=2.5"], "2.5"),
        (["model.depth=true"], "True"),
        (["model.depht=4"], "depht"),
        (["model.d_model=100"], "n_head"),
        (["model.tokens_per_parameter=0"], "positive"),
        (["model.tokens_per_parameter=1", "stage.pretrain.steps=5"], "no effect"),
        (["stage.pretrain.optimizer='adamw'"], "Muon"),
        (["stage.pretrain.batch_size='many'"], "batch_size"),
        (["stage.pretrain.batch_size=0"], "batch_size"),
        (["model.context='long'"], "context"),
    ],
)
def test_a_contradiction_is_an_error_that_names_it(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(*overrides, folder=tmp_path)


def test_a_ratio_without_a_depth_is_refused(tmp_path: Path) -> None:
    text = TEXT.replace("depth = 3", "tokens_per_parameter = 3\nn_layer = 1\nd_model = 32\nn_head = 1")
    with pytest.raises(RecipeError, match="depth"):
        recipe(text=text, folder=tmp_path)


def test_two_stages_cannot_share_one_horizon(tmp_path: Path) -> None:
    text = TEXT + '[[stage]]\nname = "more"\nshards = ["books"]\n'
    with pytest.raises(RecipeError, match="pretrain, more"):
        recipe(text=text, folder=tmp_path)
    found = recipe("stage.more.steps=9", text=text, folder=tmp_path)
    assert found.stage[1].steps == 9 and found.stage[1].batch_size >= 1


def test_a_chat_stage_keeps_its_own_numbers(tmp_path: Path) -> None:
    chat = '[[stage]]\nname = "sft"\nobjective = "sft"\nshards = ["books"]\nsteps = 5\nbatch_size = 4\n'
    assert recipe(text=TEXT + chat, folder=tmp_path).stage[1].muon_lr == 0.02
