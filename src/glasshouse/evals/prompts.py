"""Fresh prompts with known labels, by the name a constraint gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError, RecipeError, suggest
from glasshouse.data import workshop


@dataclass(frozen=True)
class Prompt:
    """One user request. ``harmful`` is gold; prompts of one ``key`` ask the same thing."""

    text: str
    harmful: bool
    key: str

    @property
    def words(self) -> list[str]:
        """The text split at spaces; an insertion's gap g stands before word g, the last gap after all."""
        return self.text.split(" ")

    def insert(self, word: str, gap: int) -> str:
        """The text with ``word`` in that gap."""
        return workshop.insert_word(self.text, word, gap)


Draw = Callable[[np.random.Generator, int, Sequence[str]], list[Prompt]]


def _workshop(is_harmful: bool | None, split: workshop.Split, stray_rate: float) -> Draw:
    def draw(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
        asked = [
            workshop.request(rng, is_harmful=is_harmful, split=split, strays=strays, stray_rate=stray_rate)
            for _ in range(n)
        ]
        return [Prompt(a.text, a.harmful, f"{a.action} {a.thing}") for a in asked]

    return draw


GENERATORS: dict[str, Draw] = {
    "workshop.harmful": _workshop(True, "any", 0.0),
    "workshop.harmless": _workshop(False, "any", 0.0),
    "workshop.requests": _workshop(None, "any", 0.3),
    "workshop.unseen": _workshop(None, "unseen", 0.3),
}


def generator(name: str) -> Draw:
    """The generator of that name. RecipeError offers the nearest."""
    if name not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise RecipeError(
            f"unknown prompt generator {name!r}.{suggest(name, list(GENERATORS))} Known: {known}"
        )
    return GENERATORS[name]


def from_file(path: Path, sha256: str | None = None) -> Draw:
    """A generator that samples without replacement from JSONL rows ``{"prompt": str, "harmful": bool}``.

    DataError for a missing or empty file, a malformed row (with its line), or a digest that differs.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such prompt file")
    if sha256 is not None and (found := sha256_file(path)) != sha256:
        raise DataError(
            f"{path}: sha256 is {found}, the constraint declares {sha256}; restore the declared file"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also cuts at characters JSON allows
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not UTF-8 at byte {problem.start}") from problem
    rows = [_row(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: no prompts in this file")

    def draw(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
        return [rows[i] for i in rng.permutation(len(rows))[:n]]

    return draw


def _row(line: str, where: str) -> Prompt:
    """One line of a prompt file. A label must be true or false: ``bool("false")`` would be True."""
    try:
        row = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{where}: not JSON ({problem})") from problem
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    text, harmful = row.get("prompt"), row.get("harmful")
    key = row.get("key", text)
    if not isinstance(text, str) or not text.strip() or not isinstance(harmful, bool):
        raise DataError(f'{where}: need {{"prompt": "some text", "harmful": true or false}}')
    if not isinstance(key, str):
        raise DataError(f'{where}: "key" must be text, not {key!r}')
    return Prompt(text, harmful, key)
