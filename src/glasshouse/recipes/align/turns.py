"""Conversations as token rows in a model's own chat format, and batches of prompts with their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.align.local import LocalEngine
from glasshouse.base.batch import Batch
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.evals.chat import ChatFormat
from glasshouse.tokenizer import Message, Tokenizer

ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")  # a turn's, first of all
Row = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt's ids and an answer's


class Turns:
    """How text becomes tokens for one tokenizer and chat format (`align.preferences.Encode`)."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.tokenizer, self.chat = engine, engine.tokenizer, engine.chat
        self.end = end_of(engine.tokenizer, engine.chat)

    def prompt(self, messages: Sequence[Mapping[str, str]] | Sequence[Message]) -> list[int]:
        """Ids up to where the assistant begins to write."""
        return self.engine.ids([Message(role=m["role"], content=m["content"]) for m in messages])

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, its end token included."""
        return [*self.tokenizer.encode(f" {text}" if self.chat.spaced else text), self.end]


def end_of(tokenizer: Tokenizer, chat: ChatFormat) -> int:
    """The token that ends an answer. UsageError when the chat format has none."""
    if chat.name == "glasshouse" and tokenizer.end is not None:
        return tokenizer.end
    named = [tokenizer.specials[n] for n in ENDS if n in tokenizer.specials]
    found = [i for i in [*named, *sorted(chat.stop)] if i in chat.stop]
    if not found:
        raise UsageError(f"the chat format {chat.name!r} has no token that ends an answer; name another one")
    return found[0]


def rows_of(
    chats: Sequence[Sequence[Mapping[str, str]]], turns: Turns, context: int
) -> tuple[list[Row], int]:
    """Conversations that end with the assistant as (prompt, answer), and how many were too long for it."""
    made = [(tuple(turns.prompt(c[:-1])), tuple(turns.answer(c[-1]["content"]))) for c in chats]
    kept = [row for row in made if len(row[0]) + len(row[1]) <= context + 1]
    return kept, len(made) - len(kept)


def read_chats(path: Path) -> dict[str, list[list[dict[str, str]]]]:
    """The chats of `align.chats.export_chats`: "revised" and "helpful" ones."""
    found: dict[str, list[list[dict[str, str]]]] = {"revised": [], "helpful": []}
    for line in path.read_text("utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        found["helpful" if row["id"].startswith("helpful-") else "revised"].append(row["messages"])
    return {name: chats for name, chats in found.items() if chats}


def plan_of(shards: Mapping[str, Sequence[Row]]) -> DataPlan:
    """All rows of every shard equally often; digests are of their contents."""
    digests = {name: digest_of([[list(p), list(a)] for p, a in rows]) for name, rows in shards.items()}
    weights = {name: float(len(rows)) for name, rows in shards.items()}
    return DataPlan(phases=(Phase(from_step=0, weights=weights),), digests=digests)


class AnswerBatches:
    """Whole rows, every one of the active shards once an epoch, in a seeded order of its own. Only the
    answers are learnt, their end tokens too."""

    def __init__(
        self, shards: Mapping[str, Sequence[Row]], tokenizer: Tokenizer, seed: int, batch_size: int
    ) -> None:
        self.shards, self.seed, self.batch_size = shards, seed, batch_size
        self.token_bytes = tokenizer.token_bytes
        self._orders: dict[tuple[int, int, int], np.ndarray] = {}

    def batch(self, step: int, plan: DataPlan) -> Batch:
        """[batch_size, longest row]. DataError when the plan leaves no row."""
        phase = plan.at(step)
        pool = [(name, row) for name in phase.active for row in self.shards[name]]
        if not pool:
            raise DataError(f"the shards {', '.join(phase.active)} hold no row")
        first = (step - phase.from_step) * self.batch_size
        drawn = [pool[self._at(i, phase.from_step, len(pool))] for i in range(first, first + self.batch_size)]
        return self._packed([row for _, row in drawn], tuple(name for name, _ in drawn))

    def _at(self, i: int, start: int, n: int) -> int:
        key = (start, i // n, n)
        if key not in self._orders:
            self._orders = {key: generator("answers", self.seed, *key).permutation(n)} | dict(
                list(self._orders.items())[:1]
            )
        return int(self._orders[key][i % n])

    def _packed(self, rows: Sequence[Row], names: tuple[str, ...]) -> Batch:
        width = max(len(p) + len(a) for p, a in rows) - 1
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        targets, weight = tokens.copy(), np.zeros((len(rows), width), dtype=np.float32)
        for k, (prompt, answer) in enumerate(rows):
            ids = np.array([*prompt, *answer])
            tokens[k, : len(ids) - 1], targets[k, : len(ids) - 1] = ids[:-1], ids[1:]
            weight[k, len(prompt) - 1 : len(ids) - 1] = 1
        n_bytes = int(self.token_bytes[targets][weight > 0].sum())
        return Batch(tokens, targets, weight, tuple(sorted(set(names))), n_bytes, names)
