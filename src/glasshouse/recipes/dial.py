"""`model.depth`: one number in a recipe from which `train.scaling` derives the others, before it is parsed.

    [model]
    depth = 4          # width, heads; of the pre-training stage: batch, steps, rates, weight decay
    context = 128

What the recipe itself says wins, key by key. The resolved numbers are what is frozen into the run.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from glasshouse.base.config import parse
from glasshouse.base.errors import RecipeError
from glasshouse.model import GPTConfig
from glasshouse.train import scaling

NUMBERS = tuple(f.name for f in fields(scaling.Horizon))


def dialled(data: dict[str, Any], where: str, default_vocabulary: int) -> dict[str, Any]:
    """``data`` with `depth` and `tokens_per_parameter` replaced by what they stand for.

    RecipeError for a depth that is no positive integer, one that contradicts ``n_layer``, or a stage that
    the rules were not made for.
    """
    model = data.get("model")
    if not isinstance(model, dict) or not {"depth", "tokens_per_parameter"} & model.keys():
        return data
    data = copy.deepcopy(data)
    model = data["model"]
    depth, ratio = model.pop("depth", None), model.pop("tokens_per_parameter", None)
    if depth is None:
        raise RecipeError(f"{where}: model.tokens_per_parameter belongs to model.depth, which is not set")
    if type(depth) is not int or depth < 1:
        raise RecipeError(f"{where}: model.depth is {depth!r}; it is the number of layers: 1 or more")
    if model.get("n_layer", depth) != depth:
        raise RecipeError(
            f"{where}: model.depth = {depth} and model.n_layer = {model['n_layer']} contradict each other; "
            "remove one"
        )
    data["model"] = model = shaped(model, depth, where)
    tokenizer = data.get("tokenizer")
    vocabulary = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    config = parse(GPTConfig, {**model, "vocab_size": vocabulary or default_vocabulary}, f"{where}: model")
    stages = data.get("stage")
    if isinstance(stages, list):
        data["stage"] = staged([s for s in stages if isinstance(s, dict)], config, ratio, where)
    return data


def shaped(model: dict[str, Any], depth: int, where: str) -> dict[str, Any]:
    """Width and heads by rule where they are not given; heads follow a width that is given."""
    rule: dict[str, Any] = scaling.shape(depth)
    width = model.get("d_model")
    if width is not None and "n_head" not in model:
        if type(width) is not int or width < 1 or width % scaling.HEAD_WIDTH:
            raise RecipeError(
                f"{where}: model.d_model = {width!r} is no multiple of the dial's head width "
                f"{scaling.HEAD_WIDTH}; set model.n_head too"
            )
        rule["n_head"] = width // scaling.HEAD_WIDTH
    return {**rule, "qk_norm": True, **model}


def staged(
    stages: list[dict[str, Any]], config: GPTConfig, ratio: float | None, where: str
) -> list[dict[str, Any]]:
    """Pre-training stages completed; stages of other objectives keep their own numbers."""
    open_ended = [s for s in stages if s.get("objective", "next_token") == "next_token" and "steps" not in s]
    if len(open_ended) > 1:
        names = ", ".join(str(s.get("name")) for s in open_ended)
        raise RecipeError(
            f"{where}: model.depth sets the steps of one stage, and {names} leave theirs open; "
            "give steps in all but one"
        )
    if ratio is not None and not open_ended:
        raise RecipeError(
            f"{where}: model.tokens_per_parameter has no effect: every pre-training stage says its steps"
        )
    done = []
    for stage in stages:
        if stage.get("objective", "next_token") != "next_token":
            done.append(stage)
            continue
        if stage.get("optimizer", "muon") != "muon" and "adam_lr" not in stage:
            raise RecipeError(
                f"{where}: stage {stage.get('name')}: the rates of model.depth are fitted with Muon; "
                "give adam_lr, or leave optimizer out"
            )
        given = {k: stage[k] for k in NUMBERS if k in stage}
        try:
            numbers = scaling.horizon(config, given, ratio)
        except (TypeError, ValueError) as problem:
            raise RecipeError(f"{where}: stage {stage.get('name')}: {problem}") from problem
        done.append({**{k: getattr(numbers, k) for k in NUMBERS}, **stage})
    return done
