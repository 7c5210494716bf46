"""Frozen, strict configuration: a mistake in a recipe is named where it stands, never ignored."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import pydantic

from glasshouse.base.digest import digest_of
from glasshouse.base.errors import RecipeError, suggest

T = TypeVar("T", bound="pydantic.BaseModel")


class Frozen(pydantic.BaseModel):
    """Immutable data with strict types, no unknown keys, and no NaN or infinity."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON of all fields, defaults included."""
        return digest_of(self.model_dump(mode="json"))


class ReadOnlyDict(dict[str, Any]):
    """A dict that refuses changes, for fields of frozen configs (pydantic freezes only the field)."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("this mapping is part of frozen data; build a new one instead")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]  # whatever they take
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]  # likewise

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),))


def parse(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build `cls` from `data` as read from JSON or TOML: strict, but a list fills a tuple.

    `where` is what a person calls the source ("recipes/demo.toml"). Raises `RecipeError` with one line
    for every problem: the key path, and the nearest valid key or the expected type.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a table of keys and values, got {type(data).__name__}")
    try:
        # Through JSON text, because pydantic's strict mode accepts lists for tuples only from there.
        return cls.model_validate_json(json.dumps(data, default=_not_json))
    except pydantic.ValidationError as error:
        problems = [_explain(cls, problem) for problem in error.errors(include_url=False)]
    except RecipeError as error:
        problems = [str(error)]
    raise RecipeError("\n".join(f"{where}: {problem}" for problem in dict.fromkeys(problems)))


def _not_json(value: Any) -> NoReturn:
    raise RecipeError(f"{value!r} is a {type(value).__name__}; write it as text, a number or a list")


def _explain(cls: type[pydantic.BaseModel], problem: Any) -> str:
    """Say one pydantic problem in a line that starts with the key path."""
    path, key, models = _locate(cls, problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        valid = sorted(name for model in models for name in _keys(model))
        hint = suggest(key, valid) or f" Valid keys: {', '.join(dict.fromkeys(valid))}."
        return f"unknown key '{path}'.{hint}"
    if kind == "missing":
        return f"missing key '{path}'"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.removeprefix("Input ")
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    subject = f"'{path}' " if path else ""
    if message.startswith("should "):
        hint = suggest(value, _quoted(message)) if isinstance(value, str) else ""
        return f"{subject}{message}, got {shown} ({type(value).__name__}).{hint}"
    return f"{subject.strip() + ': ' if subject else ''}{message}"


def _quoted(message: str) -> list[str]:
    """Return the choices that pydantic lists in single quotes in its message."""
    return message.split("'")[1::2]


def _locate(
    cls: type[pydantic.BaseModel], loc: tuple[int | str, ...]
) -> tuple[str, str, list[type[pydantic.BaseModel]]]:
    """Follow an error location; return its dotted path, the last key, and the models that hold that key."""
    path, models = "", [cls]
    parents = models
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        fields = [_keys(model)[part] for model in models if part in _keys(model)]
        if fields:
            parents, models = models, [m for field in fields for m in _models_in(field.annotation)]
        elif any(part == model.__name__ for model in models):
            models = [model for model in models if part == model.__name__]  # a union's member: not a key
            continue
        else:
            parents = models
        path += f".{part}" if path else part
    return path, str(loc[-1]) if loc else "", parents


def _keys(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """Yield every model that a type annotation mentions, through Optional, tuple, dict, union."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
