"""A recipe is read strictly, and says where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import RecipeError
from glasshouse.recipes import schema
from glasshouse.recipes.schema import load_recipe, overridden, read_recipe

DEMO = Path(schema.__file__).parent / "files" / "demo.toml"


def test_the_packaged_demo_is_valid_and_its_clean_twin_differs_only_by_the_plant() -> None:
    planted, clean = load_recipe(DEMO), load_recipe(DEMO, plant=False)
    assert planted.data.plant is not None and clean.data.plant is None
    ours, twins = planted.model_dump(mode="json"), clean.model_dump(mode="json")
    ours["data"].pop("plant"), twins["data"].pop("plant")
    assert ours == twins
    assert planted.digest() != clean.digest()


def test_every_constraint_of_the_demo_has_a_control_and_a_stage_from_which_it_counts() -> None:
    recipe = load_recipe(DEMO)
    assert all(c.control is not None for c in recipe.constraint)
    assert {c.kind for c in recipe.constraint} == {"behaviour", "representation", "circuit"}
    assert all(c.required_from == "tune" for c in recipe.constraint if c.applies_when is not None)


def test_an_unknown_key_is_named_with_the_nearest_valid_one(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(DEMO.read_text("utf-8").replace("vocab_size = 2048", "vocab_sise = 2048"), "utf-8")
    with pytest.raises(RecipeError, match=r"vocab_sise.*vocab_size"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=3", "sed"),
        ("stage.stf.steps=3", "sft"),
        ("stage.sft.steps='many'", "steps"),
        ("stage.sft.steps=0", "steps"),
        ("constraint.refusal-is-robust.bound.at_least=0.2", "exactly one"),
        ("constraint.refuses-harm.applies_when.behaviour='refuse-harm'", "refuses-harm"),
        ("constraint.refuses-harm.required_from='tuned'", "tune"),
        ("data.plant.first_shard=16", "16"),
        ("model.n_head=3", "n_head"),
        ("nonsense", "key=value"),
    ],
)
def test_a_wrong_override_is_refused_and_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(DEMO, [override])


def test_an_override_changes_the_digest_and_nothing_else() -> None:
    plain, changed = load_recipe(DEMO), load_recipe(DEMO, ["stage.sft.steps=7", "seed=9"])
    assert (changed.seed, changed.stage[1].steps) == (9, 7)
    assert changed.digest() != plain.digest()
    assert changed.stage[0] == plain.stage[0]


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_recipe(DEMO)
    assert read_recipe(recipe.model_dump(mode="json"), "again").digest() == recipe.digest()


@given(st.integers(0, 2**31), st.text(max_size=20))
def test_overriding_never_changes_the_tables_it_was_given(seed: int, text: str) -> None:
    data = {"name": "x", "stage": [{"name": "a", "steps": 1}]}
    made = overridden(
        overridden(data, f"seed={seed}"), f"stage.a.note={text!r}" if "\\" not in text else "stage.0.n=1"
    )
    assert data == {"name": "x", "stage": [{"name": "a", "steps": 1}]}
    assert made["seed"] == seed


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"name = 'x'\n\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8 at byte 11"):
        load_recipe(bad)
    bad.write_text("name = = 3", "utf-8")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(bad)
