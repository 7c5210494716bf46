"""Contrasts to find circuits on: pairs of prompts from a file, induction, refusals of the closed language."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.base.rng import generator
from glasshouse.data import workshop
from glasshouse.evals.subject import refusal_readout
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import first_token, ids_of, json_lines, padded, text_at

TASKS = ("induction", "refusal")
ROWS = 64  # of a built-in task
PERIOD = 24  # tokens that are said twice, where the context has room


@dataclass(frozen=True)
class Task:
    """A contrast, where it is from, and what could not be used."""

    contrast: Contrast
    source: str
    notes: tuple[str, ...] = ()


def task(found: Loaded, pairs: str | Path, *, chat: bool = False, seed: int = 0, same: bool = False) -> Task:
    """A built-in task by name, or a file of {"clean", "corrupt", "right", "wrong"}.

    ``same``: keep only rows of the commonest length, for ablations that compare rows position by position.
    DataError names the row whose prompts have different numbers of tokens or answers a common first token.
    """
    if str(pairs) == "induction":
        return induction(found, seed)
    if str(pairs) == "refusal":
        rows = refusal_rows(found, seed)
        return built(*rows, f"refusals of the closed language, seed {seed}", same)
    path = Path(pairs)
    if not path.suffix and not path.exists():
        raise UsageError(
            f"no task {str(pairs)!r}.{suggest(str(pairs), TASKS)} There are {', '.join(TASKS)}, or give a "
            "JSON-lines file"
        )
    return built(*file_rows(found, path, chat), path.name, same)


Ids = list[list[int]]


def built(clean: Ids, corrupt: Ids, right: Ids, wrong: Ids, source: str, same: bool) -> Task:
    """Rows as a contrast; shorter ones are padded on the right, behind what is read."""
    notes: tuple[str, ...] = ()
    if same and len({len(r) for r in clean}) > 1:
        length = Counter(len(r) for r in clean).most_common(1)[0][0]
        chosen = [i for i, r in enumerate(clean) if len(r) == length]
        notes = (
            f"This ablation compares rows position by position: {len(chosen)} rows of {length} tokens were "
            f"used, {len(clean) - len(chosen)} of other lengths were left out.",
        )
        clean, corrupt, right, wrong = ([x[i] for i in chosen] for x in (clean, corrupt, right, wrong))
    tokens, at = padded(clean)
    twin, _ = padded(corrupt)
    metric = LogitDifference(torch.tensor(right), torch.tensor(wrong), at)
    return Task(Contrast(tokens, twin, metric), source, notes)


def file_rows(found: Loaded, path: Path, chat: bool) -> tuple[Ids, Ids, Ids, Ids]:
    """Token ids of clean and corrupt prompts, and of right and wrong answers' first tokens."""
    rows = json_lines(path, ("clean", "corrupt", "right", "wrong"))
    clean, corrupt, right, wrong = list[list[int]](), list[list[int]](), list[list[int]](), list[list[int]]()
    for row in rows:
        where = str(row["where"])
        a, b = (
            ids_of(found, text_at(row, key), f"{where}, {key}", chat=chat) for key in ("clean", "corrupt")
        )
        if len(a) != len(b):
            raise DataError(
                f"{where}: clean has {len(a)} tokens and corrupt {len(b)}: patching needs the same number; "
                "choose words of as many tokens"
            )
        answers = [first_token(found, text_at(row, key), f"{where}, {key}") for key in ("right", "wrong")]
        if answers[0] == answers[1]:
            raise DataError(f"{where}: right and wrong begin with the same token; nothing tells them apart")
        clean.append(a)
        corrupt.append(b)
        right.append(answers[:1])
        wrong.append(answers[1:])
    return clean, corrupt, right, wrong


def ordinary(found: Loaded) -> list[int]:
    """Token ids that stand for text."""
    return sorted(set(range(found.tokenizer.vocab_size)) - set(found.tokenizer.specials.values()))


def induction(found: Loaded, seed: int = 0) -> Task:
    """`repeated` rows of the model's ordinary tokens."""
    begin = [] if found.tokenizer.bos is None else [found.tokenizer.bos]
    pool = torch.tensor(ordinary(found))
    period = min(PERIOD, (found.model.config.context - len(begin)) // 2, len(pool))
    if period < 4:
        raise UsageError(f"induction needs room for 4 tokens said twice; this model has it for {period}")
    contrast = repeated(pool, period, begin, seed)
    return Task(contrast, f"induction: {period} random tokens said twice, seed {seed}")


def repeated(pool: Tensor, period: int, begin: Sequence[int] = (), seed: int = 0) -> Contrast:
    """``period`` tokens of ``pool`` [n] and half of them again; in the twin the first time had another order.

    Right is what followed the last token the first time, wrong what followed it in the twin's. Both rows hold
    the same tokens, so a model that merely says again what was said cannot tell right from wrong; and the
    last token stands elsewhere in the twin, so that finding it and copying its successor both count.
    """
    drawn, ends = torch.Generator().manual_seed(seed), period // 2
    clean, corrupt, right, wrong = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    while len(clean) < ROWS:
        said = pool[torch.randperm(len(pool), generator=drawn)[:period]]
        order = torch.randperm(period, generator=drawn)
        place = int((order == ends - 1).nonzero())  # of the last token, in the twin
        if place in (ends - 1, period - 1) or order[place + 1] == ends:
            continue
        start, again = torch.tensor(begin, dtype=torch.int64), said[:ends]
        clean.append(torch.cat([start, said, again]))
        corrupt.append(torch.cat([start, said[order], again]))
        right.append(said[ends])
        wrong.append(said[order[place + 1]])
    at = torch.full((ROWS,), len(begin) + period + ends - 1)
    metric = LogitDifference(torch.stack(right), torch.stack(wrong), at)
    return Contrast(torch.stack(clean), torch.stack(corrupt), metric)


def refusal_rows(found: Loaded, seed: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Harmful requests and twins of as many tokens made harmless by another object or action.

    Two rows with another object take turns with two with another action, so that both halves hold both.
    """
    rng, readout = generator("lens refusal", seed), refusal_readout(found.tokenizer)
    clean, corrupt = list[list[int]](), list[list[int]]()
    for _ in range(50 * ROWS):
        if len(clean) == ROWS:
            break
        asked = workshop.request(rng, is_harmful=True)
        ids = ids_of(found, asked.text, "request", chat=True)
        if len(clean) % 4 < 2:
            word = asked.thing
            others = [o for o in workshop.CLASS_OF_OBJECT if not workshop.harmful(asked.action, o)]
        else:
            word = asked.action
            others = [a for a in workshop.CLASS_OF_ACTION if not workshop.harmful(a, asked.thing)]
        for at in rng.permutation(len(others)):
            twin = re.sub(rf"\b{word}\b", others[int(at)], asked.text)  # not within "baker"
            made = ids_of(found, twin, "request", chat=True)
            if len(made) == len(ids):
                clean.append(ids)
                corrupt.append(made)
                break
    if len(clean) < ROWS:
        raise DataError("too few pairs of requests have as many tokens under this tokenizer")
    n = len(clean)
    return clean, corrupt, [list(readout.positive)] * n, [list(readout.negative)] * n


def answered(found: Loaded, contrast: Contrast, rows: Sequence[int] | Tensor | None = None) -> Tensor:
    """The metric [2, n] of clean and corrupt rows."""
    numbers = torch.arange(len(contrast)) if rows is None else torch.as_tensor(rows)
    out = []
    with torch.no_grad():
        for tokens in (contrast.clean, contrast.corrupt):
            parts = [
                contrast.metric(found.model(tokens[i].to(found.model.device)), i) for i in numbers.split(64)
            ]
            out.append(torch.cat(parts).float().cpu())
    return torch.stack(out)
