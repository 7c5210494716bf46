"""From what a person names on a command line to a recipe: a packaged one, with a model put in as its base."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from glasshouse.align.constitution import SHIPPED
from glasshouse.base.errors import RecipeError, UsageError, suggest
from glasshouse.recipes.align.base import open_base
from glasshouse.recipes.align.config import OF_POLICY, REVISED, AlignConfig
from glasshouse.recipes.schema import Recipe, overridden, read_recipe
from glasshouse.verify.packs import pack_file

METHODS = (*OF_POLICY, "none")


def recipe_for(
    model: Path,
    constitution: str,
    *,
    prompts: Path | None = None,
    helpful: Path | None = None,
    judge: str = "base",
    judge_model: str | None = None,
    method: str = "grpo",
    constraints: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Recipe, Path]:
    """The recipe that aligns ``model``, and the folder that its constraints' paths start from.

    Models of the closed language get the phases of the recipe "constitutional", others those of
    "constitutional-1b"; ``overrides`` are of the form key=value. Raises what reading a recipe raises, and
    UsageError for an unknown method, a judge that is not there, or prompts that nothing gives.
    """
    if method not in METHODS:
        raise UsageError(f"no method {method!r}.{suggest(method, METHODS)} There are: {', '.join(METHODS)}")
    if not model.exists():
        raise UsageError(f"{model}: no such model; give a run, a checkpoint in one, or a Hugging Face folder")
    named = {"base": str(model.resolve()), "constitution": constitution, "judge": judge}
    if "://" not in judge and judge != "base":
        if not Path(judge).exists():
            raise UsageError(f'the judge {judge}: no such model, and no URL; "base" is the model itself')
        named["judge"] = str(Path(judge).resolve())
    if judge_model is not None:
        named["judge_model"] = judge_model
    if constitution not in SHIPPED:
        named["constitution"] = str(Path(constitution).resolve())
    for key, path in (("prompts", prompts), ("helpful", helpful)):
        if path is not None:
            named[key] = str(path.resolve())
    closed = open_base(AlignConfig(constitution=constitution, base=str(model)), Path()).closed
    if not closed and prompts is None:
        raise UsageError(
            "this model does not speak the closed language, so red-team prompts are needed: add --prompts "
            'FILE (JSONL with "prompt", or .txt with one prompt a line)'
        )
    data = template("constitutional" if closed else "constitutional-1b")
    data["align"] = {**data["align"], **named}
    rows = data.pop("constraint", [])
    folder = Path()
    if constraints is not None:
        rows, folder = constraint_rows(constraints)
    data = {**phases_alone(data, method), "constraint": rows}
    if method == "none" or method == "dpo":  # the watch on the proxy reads runs of RL
        data["constraint"] = [r for r in rows if r.get("statistic") != "overoptimisation"]
    stages = {s["name"] for s in data["stage"]}
    for row in data["constraint"]:
        if constraints is None and row.get("required_from") not in (None, *stages):
            row["required_from"] = data["stage"][-1]["name"]
    for override in overrides:
        data = overridden(data, override)
    return read_recipe(data, f"the packaged recipe {data['name']}"), folder


def template(name: str) -> dict[str, Any]:
    """A packaged recipe as it is written."""
    text = (files("glasshouse.recipes") / "files" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def phases_alone(data: dict[str, Any], method: str) -> dict[str, Any]:
    """Without what grows a model, and with the policy's stage of ``method``."""
    kept = {k: v for k, v in data.items() if k not in ("data", "tokenizer", "model", "stage")}
    stages = []
    for stage in data["stage"]:
        if REVISED[0] in stage["shards"]:
            stages.append(stage)
        elif stage["objective"] in OF_POLICY and method != "none":
            stages.append({**stage, "objective": method, "shards": list(OF_POLICY[method])})
    return {**kept, "stage": stages}


def constraint_rows(name: str) -> tuple[list[dict[str, Any]], Path]:
    """The tables of a constraint file or shipped pack, and its folder. RecipeError when it cannot be read."""
    file = pack_file(Path(name))
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise RecipeError(f"{file}: no file of constraints: {problem}") from problem
    rows = data.get("constraint")
    if not isinstance(rows, list) or not rows:
        raise RecipeError(f"{file}: holds no [[constraint]]")
    return rows, file.parent.resolve()
