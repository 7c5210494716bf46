"""The prompts of the phases: those of the user's files, or of the closed language."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.rng import generator
from glasshouse.recipes.align import gold
from glasshouse.recipes.align.config import AlignConfig
from glasshouse.tokenizer import Message

KEYS = ("prompt", "messages", "text")
PERSONS = 0.1  # of the harmless prompts of the closed language: whether a person speaks


@dataclass(frozen=True)
class Prompts:
    """Conversations that end with a user. ``known``: what the grammar knows, for probes alone."""

    red_team: list[list[Message]]
    helpful: list[list[Message]]
    known: list[gold.Prompt] = field(default_factory=list)

    @property
    def every(self) -> list[list[Message]]:
        """Both kinds, in order."""
        return [*self.red_team, *self.helpful]


def prompts_for(align: AlignConfig, folder: Path, seed: int, strays: Sequence[str], closed: bool) -> Prompts:
    """The prompts. UsageError when neither a file nor the closed language gives any."""
    if align.prompts is not None:
        helpful = read_prompts(folder / align.helpful) if align.helpful else []
        return Prompts(read_prompts(folder / align.prompts), helpful)
    if not closed:
        raise UsageError(
            'red-team prompts are needed: give --prompts FILE (JSONL with "prompt", or one prompt a line). '
            "Only models of the closed language have prompts of their own"
        )
    rng = generator("align-prompts", seed)
    team = gold.red_team(rng, align.made.red_team, strays)
    talk = int(align.made.helpful * PERSONS)
    easy = [*gold.safe(rng, align.made.helpful - talk, strays), *gold.persons(rng, talk)]
    return Prompts([as_chat(p.text) for p in team], [as_chat(p.text) for p in easy], known=[*team, *easy])


def held_out_prompts(seed: int, strays: Sequence[str], n: int) -> list[gold.Prompt]:
    """Prompts of unseen combinations, to watch a run of RL with: half red-team, half harmless."""
    rng = generator("align-held-out-prompts", seed)
    return [*gold.red_team(rng, n // 2, strays, "unseen"), *gold.safe(rng, n - n // 2, strays, "unseen")]


def as_chat(text: str) -> list[Message]:
    """A user's message as a conversation."""
    return [Message(role="user", content=text)]


def read_prompts(path: Path) -> list[list[Message]]:
    """Prompts of a file: ``.txt`` has one a line; a line of ``.jsonl`` is a text, or an object with "prompt"
    (a text, or messages that end with a user's), "messages" or "text". DataError names file and line."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file of prompts")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    plain = path.suffix == ".txt"
    found = [
        as_chat(line.strip()) if plain else _prompt(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path}: no prompt in it")
    return found


def _prompt(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); a plain list of prompts is called .txt") from error
    value = next((row[k] for k in KEYS if k in row), None) if isinstance(row, dict) else row
    if isinstance(value, str) and value.strip():
        return as_chat(value)
    if isinstance(value, list) and value and all(_is_message(m) for m in value):
        if value[-1]["role"] == "assistant":  # a whole conversation: its last answer is made anew
            value = value[:-1]
        if value and value[-1]["role"] == "user":
            return [Message(role=m["role"], content=m["content"]) for m in value]
    raise DataError(
        f"{where}: no prompt: expected a text, or messages that end with a user's, in {KEYS[0]!r}"
    )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("role", "content"))
