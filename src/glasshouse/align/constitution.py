"""A constitution is data: principles by which a model criticises, revises and compares answers.

After Bai et al. (2022), "Constitutional AI" (arXiv 2212.08073): a principle has an instruction to criticise
and one to revise (their sec. 3), and one to prefer (sec. 4). As TOML:

    name = "workshop"

    [[principle]]
    id = "paper"
    critique = "Say whether the answer helps to wet something of paper."
    revision = "Write the answer anew so that it does not help to wet paper."
    preference = "Choose the answer that does not help to wet paper."
    weight = 1.0        # how often it is drawn, beside the others (optional)
    source = "ours"     # where it is from (optional)
    held_out = false    # true: never drawn for training, kept to judge with (optional)

    [[example]]         # for few-shot critiques and revisions (optional)
    principle = "paper"
    prompt = "..."
    answer = "..."
    critique = "..."
    revision = "..."

A mistake is an error that names the key, and the nearest right one. The open recipe's JSON is read too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from glasshouse.base.config import Frozen, parse
from glasshouse.base.errors import RecipeError, UsageError, suggest
from glasshouse.tokenizer import Message

SHIPPED = ("general", "workshop")
LARGEST = 4_000_000  # bytes of a constitution file


class Principle(Frozen):
    """One value: what to criticise, how to revise, what to prefer."""

    id: str = Field(min_length=1)
    critique: str
    revision: str
    preference: str
    weight: float = Field(default=1.0, gt=0)
    source: str = ""
    held_out: bool = False

    @field_validator("critique", "revision", "preference")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("an instruction must not be empty")
        return text


class Example(Frozen):
    """One worked critique and revision under a principle, shown to a model before its own."""

    principle: str
    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class Constitution(Frozen):
    """Principles and worked examples. ``chats``: examples that come as whole conversations."""

    name: str = Field(min_length=1)
    principles: tuple[Principle, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()
    chats: tuple[tuple[tuple[str, str], ...], ...] = ()  # of (role, content)

    @model_validator(mode="after")
    def _consistent(self) -> Constitution:
        ids = [p.id for p in self.principles]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(
                f"the principle id '{twice[0]}' is there twice; ids name principles in every row"
            )
        for example in self.examples:
            if example.principle not in ids:
                raise ValueError(
                    f"an example names the principle '{example.principle}', which is not there."
                    f"{suggest(example.principle, ids)}"
                )
        if all(p.held_out for p in self.principles):
            raise ValueError("every principle is held out, so none is left to train by")
        return self

    def __getitem__(self, id: str) -> Principle:
        """The principle of that id. `UsageError` naming the nearest when there is none."""
        found = next((p for p in self.principles if p.id == id), None)
        if found is None:
            hint = suggest(id, [p.id for p in self.principles])
            raise UsageError(f"the constitution '{self.name}' has no principle '{id}'.{hint}")
        return found

    @property
    def trained(self) -> tuple[Principle, ...]:
        """The principles that training may use."""
        return tuple(p for p in self.principles if not p.held_out)

    @property
    def held_out(self) -> tuple[Principle, ...]:
        """The principles that only judge what came of training."""
        return tuple(p for p in self.principles if p.held_out)

    def draw(self, rng: np.random.Generator, n: int = 1, *, held_out: bool = False) -> list[Principle]:
        """``n`` different principles, drawn one after another by weight. `UsageError` if there are fewer."""
        among = self.held_out if held_out else self.trained
        if not 1 <= n <= len(among):
            kind = "held-out " if held_out else ""
            raise UsageError(
                f"{n} {kind}principles are asked for and the constitution '{self.name}' has {len(among)}"
            )
        weights = np.array([p.weight for p in among])
        chosen = rng.choice(len(among), size=n, replace=False, p=weights / weights.sum())
        return [among[int(i)] for i in chosen]

    def only(self, ids: Sequence[str]) -> Constitution:
        """A constitution of these principles alone, none held out: to judge by, or for an ablation."""
        kept = tuple(self[i].model_copy(update={"held_out": False}) for i in ids)
        examples = tuple(e for e in self.examples if e.principle in ids)
        return Constitution(name=f"{self.name}:{'+'.join(ids)}", principles=kept, examples=examples)


def load_constitution(source: str | Path) -> Constitution:
    """Read a constitution: a shipped one by name ("general", "workshop"), a TOML file, or the open JSON.

    `UsageError` when there is no such file or name, `RecipeError` naming every key that is wrong.
    """
    if isinstance(source, str) and source in SHIPPED:
        text = (files("glasshouse.align") / "constitutions" / f"{source}.toml").read_text(encoding="utf-8")
        return _from_toml(text, f"the shipped constitution '{source}'")
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"{path}: no such constitution file.{suggest(str(source), SHIPPED)} "
            f"Shipped are: {', '.join(SHIPPED)}"
        )
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{path}: {path.stat().st_size} bytes are no constitution ({LARGEST} at most)")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}") from error
    return _from_open_json(text, path) if path.suffix == ".json" else _from_toml(text, str(path))


class _File(Frozen):
    """A constitution as its TOML file spells it."""

    name: str
    principle: tuple[Principle, ...]
    example: tuple[Example, ...] = ()


def _from_toml(text: str, where: str) -> Constitution:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}") from error
    read = parse(_File, data, where)
    return _made(where, name=read.name, principles=read.principle, examples=read.example)


class _OpenPrinciple(Frozen):
    critic: str
    revision: str


class _OpenFile(Frozen):
    """The file of the open recipe (llm-swarm): ``{"constitutions": [...], "system_chat": [...]}``."""

    constitutions: tuple[_OpenPrinciple, ...]
    system_chat: tuple[tuple[dict[str, str], ...], ...] = ()


def _from_open_json(text: str, path: Path) -> Constitution:
    """Principles are called by their place; as the file says nothing about preferring, the critique does."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid JSON: {error}") from error
    read = parse(_OpenFile, data, str(path))
    principles = [
        {
            "id": f"{k:02d}",
            "critique": p.critic,
            "revision": p.revision,
            "preference": f"Choose the answer that gives less cause for this criticism: {p.critic}",
            "source": f"{path.name}#{k}",
        }
        for k, p in enumerate(read.constitutions, start=1)
    ]
    chats = [[_turn(m, f"{path}: system_chat[{k}]") for m in chat] for k, chat in enumerate(read.system_chat)]
    return _made(str(path), name=path.stem, principles=principles, chats=chats)


def _turn(message: dict[str, str], where: str) -> tuple[str, str]:
    if set(message) != {"role", "content"} or message["role"] not in ("user", "assistant", "system"):
        raise RecipeError(f"{where}: a message must have exactly a 'role' (user, assistant) and a 'content'")
    return message["role"], message["content"]


def _made(where: str, **data: Any) -> Constitution:
    """A constitution of what a file holds: models of tables, or what JSON has for them."""
    for key, value in data.items():
        if not isinstance(value, str):
            data[key] = [v.model_dump() if isinstance(v, Frozen) else v for v in value]
    return parse(Constitution, data, where)


def messages_of(chat: Sequence[tuple[str, str]]) -> list[Message]:
    """One of ``Constitution.chats`` as messages."""
    return [{"role": role, "content": content} for role, content in chat]
