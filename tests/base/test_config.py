from __future__ import annotations

import datetime
import math
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.config import Frozen, ReadOnlyDict, parse
from glasshouse.base.errors import RecipeError


class Schedule(Frozen):
    warmup: int = 10
    kind: Literal["linear", "cosine"] = "linear"


class Stage(Frozen):
    name: str
    steps: int = pydantic.Field(gt=0)
    lr: float = 0.1
    schedule: Schedule = Schedule()
    sites: tuple[str, ...] = ()


class Recipe(Frozen):
    seed: int
    stage: tuple[Stage, ...]
    extra: Stage | None = None


GOOD: dict[str, Any] = {"seed": 1, "stage": [{"name": "sft", "steps": 5, "sites": ["a", "b"]}]}


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    """Return GOOD with the value at `path` set."""
    import copy

    data = copy.deepcopy(GOOD)
    inner: Any = data
    for part in path[:-1]:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    inner[path[-1]] = value
    return data


def test_a_good_recipe_is_read_with_its_defaults_and_has_a_digest() -> None:
    recipe = parse(Recipe, GOOD, "r.toml")
    assert recipe.stage[0].sites == ("a", "b")
    assert recipe.stage[0].schedule.warmup == 10
    assert parse(Recipe, recipe.model_dump(mode="json"), "again") == recipe
    assert parse(Recipe, recipe.model_dump(mode="json"), "again").digest() == recipe.digest()


@given(st.integers(), st.integers())
def test_recipes_that_differ_have_different_digests(a: int, b: int) -> None:
    first, second = parse(Recipe, {**GOOD, "seed": a}, "r"), parse(Recipe, {**GOOD, "seed": b}, "r")
    assert (first.digest() == second.digest()) == (a == b)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["sead"], 1, r"r\.toml: unknown key 'sead'\. Did you mean 'seed'\?"),
        (["stage", 0, "stesp"], 1, r"unknown key 'stage\[0\]\.stesp'\. Did you mean 'steps'\?"),
        (["stage", 0, "schedule", "warmpu"], 1, r"'stage\[0\]\.schedule\.warmpu'\. Did you mean 'warmup'\?"),
        (["extra", "zzzzzz"], 1, r"unknown key 'extra\.zzzzzz'\. Valid keys: lr, name, schedule"),
        (["seed"], "1", r"'seed' should be a valid integer, got \"1\" \(str\)"),
        (["seed"], True, r"'seed' should be a valid integer, got true \(bool\)"),
        (["seed"], 1.0, r"'seed' should be a valid integer"),
        (["stage", 0, "name"], 3, r"'stage\[0\]\.name' should be a valid string, got 3 \(int\)"),
        (["stage", 0, "steps"], 0, r"'stage\[0\]\.steps' should be greater than 0, got 0"),
        (["stage", 0, "lr"], math.nan, r"'stage\[0\]\.lr' should be a finite number"),
        (["stage", 0, "schedule", "kind"], "linaer", r"'linear' or 'cosine', got \"linaer\".*mean 'linear'"),
        (["stage"], "sft", r"'stage' should be a valid (tuple|array), got \"sft\""),
        (["seed"], datetime.date(2026, 1, 1), r"r\.toml: datetime\.date.* is a date"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_a_remedy(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(Recipe, changed(path, value), "r.toml")


def test_every_mistake_is_listed_not_only_the_first() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {"sede": 1, "stage": []}, "r.toml")
    assert str(caught.value).splitlines() == [
        "r.toml: missing key 'seed'",
        "r.toml: unknown key 'sede'. Did you mean 'seed'?",
    ]


def test_a_recipe_that_is_no_table_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"r\.toml: expected a table"):
        parse(Recipe, [], "r.toml")  # type: ignore[arg-type]


def test_frozen_means_frozen() -> None:
    recipe = parse(Recipe, GOOD, "r.toml")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]
    mapping = ReadOnlyDict({"a": 1})
    for change in (
        lambda: mapping.__setitem__("a", 2),
        lambda: mapping.update(a=2),
        lambda: mapping.pop("a"),
        lambda: mapping.clear(),
        lambda: mapping.__ior__({"b": 1}),
        lambda: mapping.__delitem__("a"),
    ):
        with pytest.raises(TypeError, match="frozen data"):
            change()
    assert mapping == {"a": 1}
