"""From rows to training data: chats for fine-tuning with helpfulness data mixed in, and preference rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glasshouse.align.engines import Chat
from glasshouse.align.feedback import preferences
from glasshouse.align.position import LIMIT
from glasshouse.align.revise import job_rows
from glasshouse.align.rows import Row
from glasshouse.base.atomic import write_text
from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.rng import generator
from glasshouse.tokenizer import Message

MISSING = 0.1  # of the helpful chats asked for: a few answers come back empty, and all else is done by then


@dataclass(frozen=True)
class Exported:
    """How many chats were written, and how many revisions were left out, by why."""

    revisions: int
    helpful: int
    left_out: dict[str, int]


def export_chats(
    path: str | Path,
    out: str | Path,
    *,
    which: Literal["all", "last"] = "all",
    helpful: Sequence[Chat] = (),
    share: float | None = None,
    seed: int = 0,
    job: str | None = None,
) -> Exported:
    """Write the revisions of ``path`` as chat JSONL (`data.read_documents` reads it) to ``out``, atomically.

    ``which``: the revisions of every round (SL-CAI-n of Bai et al. 2022 is trained on all up to the n-th), or
    each chain's last. ``helpful`` chats are mixed in, in a seeded order: all of them, or as many as make
    ``share`` of the file (all, where no more than a tenth of those is missing). Empty and identical revisions
    are left out and counted. `DataError` when nothing is left, `UsageError` for too few helpful chats.
    """
    rows = [r for r in job_rows(path, job) if r["kind"] == "revision"]
    left_out = Counter(r["state"] for r in rows if r["state"] != "ok")
    good = [r for r in rows if r["state"] == "ok"]
    if which == "last":
        last = {r["root"]: r for r in good}  # rows of a chain stand in the order of its rounds
        left_out["earlier round"] = len(good) - len(last)
        good = list(last.values())
    if not good:
        raise DataError(f"{path}: no revision to train on ({dict(left_out)}); look at what the model writes")
    chosen = _some(helpful, share, len(good), seed)
    lines = [_line(r) for r in good]
    lines += [{"id": f"helpful-{k:06d}", "messages": list(chat)} for k, chat in enumerate(chosen)]
    order = generator("mixed", seed, len(lines)).permutation(len(lines))
    text = "".join(json.dumps(lines[int(i)], ensure_ascii=False, sort_keys=True) + "\n" for i in order)
    write_text(out, text)
    return Exported(len(good), len(chosen), {k: n for k, n in sorted(left_out.items()) if n})


def export_preferences(
    path: str | Path, out: str | Path, job: str | None = None, *, position_limit: float = LIMIT
) -> int:
    """Write the rows of ``path`` that a reward model may learn from as JSONL, atomically; return how many.

    Raises as `feedback.preferences`: nothing is written of a judge that chose by position.
    """
    rows = preferences(path, job, position_limit=position_limit)
    write_text(out, "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rows))
    return len(rows)


def answered(path: str | Path, job: str | None = None) -> list[list[Message]]:
    """The chats of a file of answers (`revise` with ``rounds=0``): a model's own helpful data."""
    rows = [r for r in job_rows(path, job) if r["kind"] == "answer" and r["state"] == "ok"]
    return [[*r["prompt"], {"role": "assistant", "content": r["text"]}] for r in rows]


def _line(row: Row) -> dict[str, Any]:
    return {
        "id": f"revision-{row['key'][:24]}",
        "messages": [*row["prompt"], {"role": "assistant", "content": row["text"]}],
        **{name: row[name] for name in ("principle", "round", "model", "constitution")},
        "row": row["key"],
    }


def _some(helpful: Sequence[Chat], share: float | None, revisions: int, seed: int) -> list[Chat]:
    if share is None:
        return list(helpful)
    if not 0 <= share < 1:
        raise UsageError(f"the share of helpful chats must be in [0, 1), not {share}")
    wanted = round(revisions * share / (1 - share))
    if wanted * (1 - MISSING) > len(helpful):
        raise UsageError(
            f"a share of {share:g} beside {revisions} revisions takes {wanted} helpful chats and there are "
            f"{len(helpful)}; give more of them, or a smaller share"
        )
    order = generator("helpful", seed, len(helpful)).permutation(len(helpful))
    return [helpful[int(i)] for i in order[:wanted]]
