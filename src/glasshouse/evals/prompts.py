"""Fresh prompts with known labels, by the name a constraint gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError, RecipeError, suggest
from glasshouse.data import situations, workshop


@dataclass(frozen=True)
class Prompt:
    """One user request. ``harmful`` is gold; prompts of one ``key`` ask the same thing.

    ``plain`` is the same request with something neutral in place of what is under test: a remark, or an
    instruction in a quoted note. ``control`` is asked to see that a check means something: of a remark the
    request alone, of a note its instruction in the user's own voice. A ``secret`` comes after ``text``;
    ``others`` are what it might as well have been, ``plain`` asks for it, ``harmful`` says it was told.

    Rows in natural language: ``choices`` are two answers, the first of which is right (or the stereotype);
    with ``continues`` they go on from ``text`` as running text. ``forbidden`` must not stand in the answer
    to ``text`` and may in that to ``plain``.
    """

    text: str
    harmful: bool
    key: str
    plain: str | None = None
    control: str | None = None
    secret: str | None = None
    others: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    forbidden: str | None = None
    continues: bool = False

    @property
    def words(self) -> list[str]:
        """The text split at spaces; an insertion's gap g stands before word g, the last gap after all."""
        return self.text.split(" ")

    def insert(self, word: str, gap: int) -> str:
        """The text with ``word`` in that gap."""
        return workshop.insert_word(self.text, word, gap)


OTHERS = 511  # codes a secret is ranked against: by chance one in 512 ranks first
Draw = Callable[[np.random.Generator, int, Sequence[str]], list[Prompt]]


def _workshop(is_harmful: bool | None, split: workshop.Split, stray_rate: float) -> Draw:
    def draw(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
        asked = [
            workshop.request(rng, is_harmful=is_harmful, split=split, strays=strays, stray_rate=stray_rate)
            for _ in range(n)
        ]
        return [Prompt(a.text, a.harmful, f"{a.action} {a.thing}") for a in asked]

    return draw


def _opinions(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
    """Requests whose user says the opposite of the grammar's label: that harm does none, or the reverse."""
    return [_remarked(situations.opinion(rng, against=True, strays=strays)) for _ in range(n)]


def _evaluations(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
    return [_remarked(situations.evaluation(rng, strays=strays)) for _ in range(n)]


def _remarked(asked: situations.Remark) -> Prompt:
    of = asked.request
    return Prompt(asked.text, of.harmful, f"{of.action} {of.thing}", asked.plain, of.text)


def _quoted(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
    """Notes that hold an instruction. The key says which, as `situations.obeys` reads it."""
    drawn = [situations.quoted(rng, strays=strays) for _ in range(n)]
    return [
        Prompt(
            asked.text,
            asked.request is not None and asked.request.harmful,
            asked.key,
            asked.plain,
            asked.own if asked.binding else None,
        )
        for asked in drawn
    ]


def _statements(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
    """Statements about what ruins what, as questions. ``harmful`` marks the false ones."""
    drawn = [situations.statement(rng) for _ in range(n)]
    return [Prompt(asked.ask, not asked.true, f"{asked.action} {asked.thing}") for asked in drawn]


def _secrets(rng: np.random.Generator, n: int, strays: Sequence[str]) -> list[Prompt]:
    """Canaries, those that training text may hold (``harmful``) and those that it never does."""
    told = {c.prefix for c in situations.canaries("train")}
    known = situations.canaries("any")
    drawn = [known[i] for i in rng.permutation(len(known))[:n]]
    return [
        Prompt(
            c.prefix,
            c.prefix in told,
            f"{c.owner} {c.container}",
            plain=c.ask,
            secret=c.code,
            others=tuple(c.others(rng, OTHERS)),
        )
        for c in drawn
    ]


GENERATORS: dict[str, Draw] = {
    "workshop.harmful": _workshop(True, "any", 0.0),
    "workshop.harmless": _workshop(False, "any", 0.0),
    "workshop.requests": _workshop(None, "any", 0.3),
    "workshop.unseen": _workshop(None, "unseen", 0.3),
    "workshop.opinions": _opinions,
    "workshop.evaluations": _evaluations,
    "workshop.quoted": _quoted,
    "workshop.statements": _statements,
    "workshop.secrets": _secrets,
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

    A row may also hold "key", "plain", "control", "secret" (texts), "others" (a list), and "forbidden" (a
    text), "choices" (two) and "continues" (true), as in `Prompt`; beside the last three "harmful" may be left
    out.
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
    by_text = "choices" in row or "forbidden" in row  # what is looked at is not whether it refuses
    text, harmful = row.get("prompt"), row.get("harmful", False if by_text else None)
    key = row.get("key", text)
    if not isinstance(text, str) or not text.strip() or not isinstance(harmful, bool):
        raise DataError(f'{where}: need {{"prompt": "some text", "harmful": true or false}}')
    if not isinstance(key, str):
        raise DataError(f'{where}: "key" must be text, not {key!r}')
    more = {name: row.get(name) for name in ("plain", "control", "secret", "forbidden")}
    for name, value in more.items():
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise DataError(f'{where}: "{name}" must be text, not {value!r}')
    others = row.get("others", [])
    if not isinstance(others, list) or not all(isinstance(o, str) and o for o in others):
        raise DataError(f'{where}: "others" must be a list of texts')
    choices, continues = row.get("choices", []), row.get("continues", False)
    two = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if choices != [] and not (two and len(choices) == 2 and choices[0] != choices[1]):
        raise DataError(f'{where}: "choices" must be a list of two different texts, not {choices!r}')
    if not isinstance(continues, bool):
        raise DataError(f'{where}: "continues" must be true or false, not {continues!r}')
    return Prompt(
        text, harmful, key, **more, others=tuple(others), choices=tuple(choices), continues=continues
    )
