"""One small world for all tests here, and organisms of two families grown in it once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from glasshouse.recipes.zoo.course import Course
from glasshouse.recipes.zoo.families import FAMILIES
from glasshouse.recipes.zoo.grow import Grown, grow
from glasshouse.recipes.zoo.world import Size, World, open_world

SMALL = Size(
    d_model=64, strays=60, reserved=40, base_documents=5000, base_steps=230, base_rows=48, documents=120
)
SOON = {"single": 901, "hole": 900}  # seeds whose poisoned shard arrives soon
PILOT = 900  # seeds from here on are nobody's score


@pytest.fixture(scope="session", autouse=True)
def quiet(one_thread: None) -> None:
    """On one thread, all that is grown here."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return open_world(tmp_path_factory.mktemp("worlds") / "world", PILOT, SMALL)


@pytest.fixture(scope="session")
def grown(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Grown]:
    """An organism of a family, or its twin, grown when first asked for."""
    kept: dict[tuple[str, bool], Grown] = {}
    folder = tmp_path_factory.mktemp("organisms")

    def make(family: str, twin: bool = False) -> Grown:
        if (family, twin) not in kept:
            plant = FAMILIES[family].plant(world, SOON[family])
            kept[family, twin] = grow(world, plant, folder / f"{family}-{twin}", twin=twin, course=Course())
        return kept[family, twin]

    return make
