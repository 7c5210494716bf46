"""Preference rows: a prompt, two answers, and the probability that the first is the better one.

A file holds one JSON object a line: {"prompt": [messages], "chosen": str, "rejected": str, "p": number},
and whatever else its maker wrote. ``p`` is a soft label; without one it is 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glasshouse.align.sequences import Sequences, pack
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator


@dataclass(frozen=True)
class Preference:
    """Token ids of a prompt and two answers (each with its end token); ``p`` in [0, 1]."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    p: float = 1.0

    @property
    def key(self) -> str:
        """Names the prompt: rows of one prompt are not independent."""
        return digest_of(list(self.prompt))[:16]


class Encode(Protocol):
    """How text becomes tokens, for one tokenizer and chat format."""

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids up to where the assistant begins to write."""

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, its end token included."""


def preferences_of(rows: Sequence[Mapping[str, Any]], encode: Encode, where: str) -> list[Preference]:
    """Rows as tokens. DataError, naming ``where`` and the row (from 1), for one that cannot be used."""
    made = []
    for number, row in enumerate(rows, start=1):
        missing = [key for key in ("prompt", "chosen", "rejected") if not row.get(key)]
        p = row.get("p", 1.0)
        if missing or not isinstance(p, int | float) or not 0 <= p <= 1:
            what = f"lacks '{missing[0]}'" if missing else f"has p = {p!r}, which is no probability"
            raise DataError(f"{where}, row {number}: {what}; correct or remove the row")
        chosen, rejected = (tuple(encode.answer(row[key])) for key in ("chosen", "rejected"))
        made.append(Preference(tuple(encode.prompt(row["prompt"])), chosen, rejected, float(p)))
    if not made:
        raise DataError(f"{where}: no preference row to learn from; make some first")
    return made


def load_preferences(path: Path, encode: Encode) -> list[Preference]:
    """Read a JSONL file of rows. DataError for a line that is no object, or as `preferences_of`."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); was it cut off?") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not an object; see the documented format")
        rows.append(row)
    return preferences_of(rows, encode, str(path))


def split(
    rows: Sequence[Preference], held_out: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """(to learn from, held out): whole prompts, so that no prompt is in both."""
    keys = sorted({row.key for row in rows})
    generator("preference-split", seed).shuffle(keys)
    away = set(keys[: round(held_out * len(keys))])
    return [r for r in rows if r.key not in away], [r for r in rows if r.key in away]


@dataclass(frozen=True)
class Pairs:
    """What `Stage.batches` gives: some preferences and the shards they come from."""

    rows: tuple[Preference, ...]
    shards: tuple[str, ...]


@dataclass(frozen=True)
class PairTensors:
    """2 N rows: all chosen answers, then all rejected ones; ``p`` fp32 [N]; ``ref_logp`` [2N] of whole
    answers under the reference, where there is one. ``notes``: numbers for the log, from the objective.
    """

    both: Sequences
    p: Tensor
    shards: tuple[str, ...]
    notes: dict[str, Any]
    ref_logp: Tensor | None = None


def pair_tensors(pairs: Pairs, context: int, device: torch.device, where: str) -> PairTensors:
    """Tensors of ``pairs``; chosen and rejected go through the model together."""
    rows = pairs.rows
    prompts = [row.prompt for row in rows] * 2
    answers = [row.chosen for row in rows] + [row.rejected for row in rows]
    both = pack(prompts, answers, context=context, device=device, where=where)
    p = torch.tensor([row.p for row in rows], dtype=torch.float32, device=device)
    return PairTensors(both, p, pairs.shards, {})


def preference_plan(shards: Mapping[str, Sequence[Preference]]) -> DataPlan:
    """All of every shard, from the first step on; digests are of the rows' contents."""
    digests = {
        name: digest_of([[list(r.prompt), list(r.chosen), list(r.rejected), r.p] for r in rows])
        for name, rows in shards.items()
    }
    return DataPlan(phases=(Phase(from_step=0, weights=dict.fromkeys(digests, 1.0)),), digests=digests)


def pair_batches(
    shards: Mapping[str, Sequence[Preference]], batch_size: int, seed: int
) -> Callable[[int, DataPlan], Pairs]:
    """``batches(step, plan)``: every row of the active shards once an epoch, in a seeded order of its own.

    Weights above 0 count as 1. A new phase of the plan begins a new epoch.
    """

    def batches(step: int, plan: DataPlan) -> Pairs:
        phase = plan.at(step)
        pool = [(name, row) for name in phase.active for row in shards[name]]
        if not pool:
            raise DataError(f"the shards {', '.join(phase.active)} hold no preference row")
        first = (step - phase.from_step) * batch_size
        some = []
        orders: dict[int, Any] = {}
        for at in range(first, first + batch_size):
            epoch = at // len(pool)
            if epoch not in orders:
                orders[epoch] = generator("pairs", seed, phase.from_step, epoch).permutation(len(pool))
            some.append(pool[int(orders[epoch][at % len(pool)])])
        return Pairs(tuple(row for _, row in some), tuple(sorted({name for name, _ in some})))

    return batches
