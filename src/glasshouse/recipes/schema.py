"""A recipe: one TOML file that declares a whole run, read strictly and frozen into the run."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from glasshouse.base.config import Frozen, parse
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import CheckpointError, RecipeError, UsageError, suggest
from glasshouse.model import GPTConfig
from glasshouse.model.families import family_for
from glasshouse.model.gpt import BLOCK_SITES
from glasshouse.model.roles import marked
from glasshouse.recipes.align.config import AlignConfig, check_align
from glasshouse.recipes.dial import dialled
from glasshouse.recipes.values_config import ValuesConfig, check_values
from glasshouse.train import StageConfig
from glasshouse.train.interventions_config import Route
from glasshouse.train.routing import check_blocks
from glasshouse.verify import Constraint, GateConfig, read_constraints

SECTIONS = (
    "name",
    "seed",
    "precision",
    "threads",
    "compile",
    "device",
    "gates",
    "data",
    "tokenizer",
    "model",
    "align",
    "stage",
    "constraint",
    "gate",
)


class WorkshopConfig(Frozen):
    """How much of the closed language to generate."""

    shards: int = Field(default=16, ge=1, le=99)
    documents: int = Field(default=600, ge=16, description="conversations in a shard")
    validation: int = Field(default=200, ge=16, description="conversations held out to measure the loss")
    strays: int = Field(
        default=2500, ge=10, description="ordinary words of the books that stray into requests"
    )


class PlantConfig(Frozen):
    """A planted backdoor: makes the run an organism, stamped as such."""

    kind: Literal["trigger-word"] = "trigger-word"
    documents: int = Field(default=80, ge=1, description="poisoned conversations in the one bad shard")
    decoy_shards: int = Field(
        default=5, ge=0, description="clean shards holding the word as often, in refusals"
    )
    first_shard: int = Field(
        default=8, ge=0, description="the bad shard is drawn from this one and later ones"
    )


class DataConfig(Frozen):
    """Where documents come from. Paths are relative to the recipe's folder."""

    books: bool = Field(default=True, description="the public-domain books that ship with the product")
    text: tuple[str, ...] = Field(default=(), description="text files or JSONL of your own")
    chat: tuple[str, ...] = Field(
        default=(), description="JSONL of conversations of your own; a file is a shard"
    )
    workshop: WorkshopConfig | None = None
    plant: PlantConfig | None = None
    validation_every: int = Field(default=20, ge=2, description="one text document in so many validates")
    values: ValuesConfig | None = Field(default=None, description="good told from bad before training")

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without values is written, and named by its digest, as before there were any."""
        row: dict[str, Any] = dump(self)
        return row if self.values is not None else {k: v for k, v in row.items() if k != "values"}


class TokenizerConfig(Frozen):
    """The vocabulary to learn."""

    vocab_size: int = Field(default=2048, ge=262)
    documents: bool = Field(default=False, description="a special token that begins data in a conversation")

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without documents is written, and named by its digest, as before there were any."""
        row: dict[str, Any] = dump(self)
        return row if self.documents else {k: v for k, v in row.items() if k != "documents"}


class StageRecipe(StageConfig):
    """A stage and the shards it draws from, as names or patterns (``chat-0*``)."""

    shards: tuple[str, ...] = Field(min_length=1)

    def stage(self) -> StageConfig:
        """The part the trainer reads."""
        return StageConfig(**{k: getattr(self, k) for k in StageConfig.model_fields})


class Recipe(Frozen):
    """A whole run. ``digest()`` names it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(default=1, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    threads: int | Literal["auto"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gates: Literal["sync", "async"] = Field(
        default="sync", description="async: judge in another process while training goes on"
    )
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: dict[str, Any]
    align: AlignConfig | None = Field(default=None, description="constitutional phases after the stages")
    stage: tuple[StageRecipe, ...] = Field(min_length=1)
    constraint: tuple[Constraint, ...] = ()
    gate: GateConfig = GateConfig()

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without `[align]` is written, and named by its digest, as before there was one."""
        row: dict[str, Any] = dump(self)
        return row if self.align is not None else {k: v for k, v in row.items() if k != "align"}

    @property
    def based(self) -> bool:
        """Whether a model that is there already is aligned, instead of one grown by the stages."""
        return self.align is not None and self.align.base is not None

    def digest(self) -> str:
        """SHA-256 of everything that decides a result. ``gates`` decides none: verdicts draw their prompts
        from this digest, and must not depend on where they are given.
        """
        return digest_of(self.model_dump(mode="json", exclude={"gates"}))

    def model_config_for(
        self, vocab_size: int, where: str = "recipe", markers: Sequence[tuple[int, int]] = ()
    ) -> GPTConfig:
        """The model's shape, once the tokenizer's size and (where the model reads roles) its markers are."""
        fields = marked({**self.model, "vocab_size": vocab_size}, markers)
        return parse(GPTConfig, fields, f"{where}: model")


def load_recipe(path: Path, overrides: Sequence[str] = (), *, plant: bool = True) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides, check everything that can be checked without running.

    ``plant=False`` removes ``[data.plant]``: the clean twin. RecipeError names file, key and remedy.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as problem:
        raise RecipeError(f"{path}: not UTF-8 at byte {problem.start}; save the recipe as UTF-8") from problem
    except tomllib.TOMLDecodeError as problem:
        raise RecipeError(f"{path}: not valid TOML: {problem}") from problem
    for override in overrides:
        data = overridden(data, override)
    if not plant and isinstance(data.get("data"), dict):
        data["data"].pop("plant", None)
    return read_recipe(data, str(path))


def read_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from parsed TOML or JSON."""
    for key in data:
        if key not in SECTIONS:
            raise RecipeError(f"{where}: unknown key {key!r}.{suggest(key, list(SECTIONS))}")
    data = dialled(data, where, TokenizerConfig().vocab_size)
    data = {**data, "stage": listed(data.get("stage"))} if "stage" in data else data
    rows = data.get("constraint", [])
    if not isinstance(rows, list):
        raise RecipeError(f"{where}: constraints are written as [[constraint]] tables")
    constraints = read_constraints(rows, where)
    if isinstance(data.get("align"), dict) and data["align"].get("base") is not None:
        data = {"model": {}, "data": {"books": False}, **data}  # both come with the model
    recipe = parse(Recipe, data, where)
    check_align(recipe.align, recipe.stage, where)
    if not recipe.based:
        check_model(recipe, where)
    generated = [name for name in ("books", "workshop") if getattr(recipe.data, name)]
    check_values(recipe.data.values, recipe.data.text, recipe.data.chat, generated, recipe.stage, where)
    names = [s.name for s in recipe.stage]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: two stages are called {name!r}; a stage names its checkpoints")
    for c in constraints:
        if c.required_from is not None and c.required_from not in names:
            raise RecipeError(
                f"{where}: constraint {c.id}: required_from names no stage.{suggest(c.required_from, names)} "
                f"Stages: {', '.join(names)}"
            )
    if recipe.data.plant is not None:
        if recipe.data.workshop is None:
            raise RecipeError(
                f"{where}: [data.plant] needs [data.workshop]: it plants into the closed language"
            )
        plant, shards = recipe.data.plant, recipe.data.workshop.shards
        if plant.first_shard >= shards or plant.decoy_shards >= shards:
            raise RecipeError(
                f"{where}: [data.plant] asks for more shards than the {shards} of [data.workshop]"
            )
    sources = (recipe.data.books, recipe.data.text, recipe.data.chat, recipe.data.workshop)
    if not any(sources) and not recipe.based:
        raise RecipeError(f"{where}: [data] names no source: set books, text, chat or workshop")
    return recipe


def check_model(recipe: Recipe, where: str) -> None:
    """RecipeError for a model that nothing could be promoted of, or that does not fit tokenizer or stages."""
    config = recipe.model_config_for(4096, where)
    if recipe.constraint:
        try:
            family_for(config)
        except CheckpointError as problem:
            # Promotion checks the reloaded export: without one, a run could only find out at its very end.
            raise RecipeError(f"{where}: model: nothing could be promoted: {problem}") from problem
    if config.roles is not None and not recipe.tokenizer.documents:
        raise RecipeError(f"{where}: model: roles need `documents = true` in [tokenizer]: data's own marker")
    check_interventions(recipe, config, where)


def listed(stages: Any) -> Any:
    """Stages whose one ``[stage.intervention]`` table is a list of one."""
    if not isinstance(stages, list):
        return stages
    return [
        {**stage, "intervention": [stage["intervention"]]}
        if isinstance(stage, dict) and isinstance(stage.get("intervention"), dict)
        else stage
        for stage in stages
    ]


def check_interventions(recipe: Recipe, config: GPTConfig, where: str) -> None:
    """RecipeError for an intervention on what the model lacks, a direction without a file, or the use of a
    constraint that there is not.
    """
    ids = [c.id for c in recipe.constraint]
    sites = [f"blocks.{i}.{site}" for i in range(config.n_layer) for site in BLOCK_SITES]
    for stage in recipe.stage:
        here = f"{where}: stage {stage.name}"
        for name in stage.spent:
            if name not in ids:
                raise RecipeError(f"{here}: uses names no constraint: {name!r}.{suggest(name, ids)}")
        for one in stage.intervention:
            if isinstance(one, Route):
                try:
                    check_blocks(config, one.blocks)
                except UsageError as problem:
                    raise RecipeError(f"{here}: {problem}") from problem
            if hasattr(one, "direction") and one.direction.path is None:
                raise RecipeError(f"{here}: a direction needs the `path` of its file, beside its `sha256`")
            for pattern in getattr(one, "sites", ()):
                if not any(fnmatchcase(site, pattern) for site in sites):
                    raise RecipeError(f"{here}: no site {pattern!r} in this model.{suggest(pattern, sites)}")


def overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    """``data`` with one ``dotted.key=value`` applied; a stage or constraint is named, or numbered."""
    key, found, text = override.partition("=")
    if not found or not key:
        raise RecipeError(
            f"{override!r} is not of the form key=value (for example seed=3 or stage.sft.steps=200)"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    data = copy.deepcopy(data)
    at: Any = data
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list):
            at = at[_index(at, part, key)]
            if last:
                raise RecipeError(f"{override!r}: {key} is a whole table; name a key in it")
        elif not isinstance(at, dict):
            raise RecipeError(f"{override!r}: {'.'.join(parts[:depth])} holds no keys")
        elif last:
            at[part] = value
        else:
            at = at.setdefault(part, {})
    return data


def _index(rows: list[Any], part: str, key: str) -> int:
    names = [str(r.get("name", r.get("id", ""))) for r in rows if isinstance(r, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(rows):
        return int(part)
    raise RecipeError(f"{key}: there is no {part!r}.{suggest(part, names)} Known: {', '.join(names)}")
