"""What a recipe declares to be done inside the model while a stage trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command import call, entries
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import RecipeError
from glasshouse.recipes import schema
from glasshouse.recipes.run import gate_of_run, open_run
from glasshouse.recipes.schema import load_recipe, read_recipe
from glasshouse.train.directions import Direction, write_direction
from story.tiny import write_recipe

DEMO = Path(schema.__file__).parent / "files" / "demo.toml"
TABLE = """
[stage.intervention]
kind = "steer"
scale = 2.0
shards = ["chat-01"]
uses = ["complies-often"]
direction = {{ path = "way.safetensors", sha256 = "{digest}" }}
"""


def with_direction(folder: Path, width: int = 32) -> Path:
    """The tiny recipe whose last stage steers along a direction from a file beside it."""
    recipe = write_recipe(folder)
    (folder / "elsewhere").mkdir()
    digest = write_direction(folder / "elsewhere", Direction("blocks.0.resid_post", torch.ones(1, width)))
    (folder / "elsewhere" / "directions" / f"{digest}.safetensors").rename(folder / "way.safetensors")
    text = recipe.read_text("utf-8")
    recipe.write_text(text.replace("\n[gate]\n", TABLE.format(digest=digest) + "\n[gate]\n"), "utf-8")
    return recipe


def test_one_table_is_a_list_of_one_and_survives_being_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(with_direction(tmp_path))
    assert [one.kind for one in recipe.stage[1].intervention] == ["steer"]
    assert recipe.stage[1].spent == ("complies-often",) and recipe.stage[0].spent == ()
    assert read_recipe(recipe.model_dump(mode="json"), "frozen") == recipe


def test_where_gates_judge_is_no_part_of_what_the_recipe_means(tmp_path: Path) -> None:
    """Prompts are drawn from the recipe's digest: it may not depend on where they are put."""
    file = write_recipe(tmp_path)
    here, there, other = load_recipe(file), load_recipe(file, ["gates=async"]), load_recipe(file, ["seed=9"])
    assert there.gates == "async" and here.digest() == there.digest() != other.digest()


def test_a_recipe_that_steers_trains_otherwise_and_takes_its_direction_along(tmp_path: Path) -> None:
    """The direction lies in the run by digest, is ledgered with the data, and the verifier is spent."""
    recipe, plain = with_direction(tmp_path), tmp_path / "plain"
    plain.mkdir()
    for path, run in ((recipe, "steered"), (write_recipe(plain), "plain")):
        done = call("train", path, "--run", tmp_path / run, "--quiet")
        assert done.code == (8 if run == "steered" else 0), done  # held: nothing held out speaks for it
    (tmp_path / "way.safetensors").unlink()
    run = tmp_path / "steered"
    digest = sha256_file(next((run / "directions").iterdir()))
    data = entries(run, "data")[0]["body"]
    assert data["artifacts"][f"directions/{digest}.safetensors"] == digest
    last = [entries(tmp_path / name, "checkpoint")[-1]["body"] for name in ("steered", "plain")]
    assert last[0]["artifacts"] != last[1]["artifacts"]
    assert gate_of_run(run, "fp32").uses == {"sft": ("complies-often",)}
    files = sorted(run.glob("evals/gate-*/verdicts.json"))
    assert all(json.loads(f.read_text())["verdicts"][0]["spent"] for f in files)
    assert entries(run, "finish")[-1]["body"]["promoted"] is False
    assert open_run(run).stage[1].intervention[0].kind == "steer"


@pytest.mark.parametrize(
    ("intervention", "said"),
    [
        ({"kind": "steer", "direction": {"sha256": "0" * 64}}, "needs the `path`"),
        ({"kind": "pray"}, "pray"),
        ({"kind": "route", "shards": ["chat-01"], "blocks": [{"layer": 99, "units": [0, 4]}]}, "layer 99"),
        ({"kind": "route", "shards": ["chat-01"], "blocks": [{"layer": 0}]}, "names nothing"),
        (
            {"kind": "ablate", "direction": {"sha256": "0" * 64, "path": "x"}, "sites": ["blocks.*.resid"]},
            "no site",
        ),
        ({"kind": "drop", "shards": ["chat-01"], "uses": ["refuses-hram"]}, "refuses-harm"),
        ({"kind": "drop", "shards": ["chat-01"], "scale": 1.0}, "scale"),
        ({"kind": "probe_penalty", "direction": {"sha256": "0" * 64}, "weight": 1.0}, "uses"),
    ],
)
def test_an_intervention_that_cannot_be_made_is_refused_and_named(
    intervention: dict[str, Any], said: str
) -> None:
    data = load_recipe(DEMO).model_dump(mode="json")
    data["stage"][-1]["intervention"] = intervention
    with pytest.raises(RecipeError, match=said):
        read_recipe(data, "r.toml")


def test_a_direction_that_is_not_the_declared_one_is_refused_before_training(tmp_path: Path) -> None:
    recipe = with_direction(tmp_path)
    (tmp_path / "way.safetensors").write_bytes(b"something else")
    done = call("train", recipe, "--run", tmp_path / "run", "--quiet")
    assert done.code != 0 and "is not a direction's file" in done.err


def test_what_uses_a_constraint_that_is_not_there_makes_no_gate(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="complies-often"):
        load_recipe(with_direction(tmp_path), ["stage.sft.uses=['complies-oftn']"])
