"""The supervised phase: a model answers, criticises its answer under a principle, and writes it anew.

Bai et al. (2022), sec. 3: a prompt, an answer, then ``rounds`` times a principle is drawn, a critique asked
for and a revision; each round starts from the last revision. Every text is a durable row (`rows.Rows`) with
the question it answers, its principle, the digest of the model and the row it builds on, so that a killed job
goes on where it was and every training text can be traced to the principles it came from.

Row: {"key", "kind": "answer" | "critique" | "revision", "round", "state", "text", "prompt", "messages" (what
the model was asked), "principle" (its id; "" for answers), "parent" (key; "" for answers), "root" (key of the
chain's answer), "copy" (of a prompt that stands in the list more than once), "model", "engine",
"constitution", "job", "sampling"}. The state of a revision is "ok", "empty" or "identical" to what it should
revise; only "ok" is trained on. A reply that could not be read is "malformed", whatever it was to be: its
chain stops there, its row ("instead_of" names the key that stays free) is trained on by nobody, and the next
run asks again and goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from glasshouse.align.constitution import Constitution, messages_of
from glasshouse.align.engines import Chat, Engine, Unreadable
from glasshouse.align.rows import Row, Rows, read_rows
from glasshouse.base.config import Frozen
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.rng import generator, seed_from
from glasshouse.base.score import Score, rate
from glasshouse.tokenizer import Message


class Revising(Frozen):
    """How the supervised phase is done. ``shots``: worked examples shown first; 0 is zero-shot."""

    rounds: int = Field(default=4, ge=0)
    shots: int = Field(default=0, ge=0)
    answer_tokens: int = Field(default=128, ge=1)
    critique_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    seed: int = 0
    chunk: int = Field(default=32, ge=1, description="prompts that go through the rounds together")


@dataclass(frozen=True)
class RevisionSummary:
    """What a file of rows holds. ``by_principle``: how the revisions under each principle came out."""

    rows: int
    answers: int
    empty_answers: int
    revisions: dict[str, int]  # by state
    by_principle: dict[str, dict[str, int]]
    usable: Score | None  # share of revisions that are trained on; None without revisions
    malformed: int = 0  # replies that could not be read: the same command asks for them again


@dataclass(frozen=True)
class _Question:
    """What is asked next, and for what: everything that names the row it becomes."""

    kind: Literal["answer", "critique", "revision"]
    round: int
    messages: tuple[tuple[str, str], ...]
    principle: str
    parent: str
    copy: int
    revises: str  # the text that a revision revises


class _Job:
    """One engine, one constitution, one way: what the rows of a job have in common."""

    def __init__(self, engine: Engine, constitution: Constitution, settings: Revising, rows: Rows) -> None:
        self.engine, self.constitution, self.settings, self.rows = engine, constitution, settings, rows
        # How many go together decides nothing about any of them.
        way = settings.model_dump(mode="json", exclude={"chunk", "rounds"})
        self.common = {
            "model": engine.digest,
            "constitution": constitution.digest(),
            "job": digest_of([engine.digest, constitution.digest(), way]),
        }
        self.shots = worked_examples(constitution, settings.shots)

    def ask(self, questions: Sequence[tuple[_Question, Row | None]]) -> list[Row]:
        """The row of every question, asked now unless it is there. A question comes with its chain's root.

        A reply that could not be read gives a row that says so, under a key of its own.
        """
        keys = [self._key(q) for q, _ in questions]
        missing = [k for k, key in enumerate(keys) if key not in self.rows]
        if missing:
            some = [questions[k][0] for k in missing]
            critique = some[0].kind == "critique"
            texts = self.engine.write(
                [messages_of(q.messages) for q in some],
                self.settings.critique_tokens if critique else self.settings.answer_tokens,
                self.settings.temperature,
                [seed_from(keys[k]) for k in missing],
            )
            with self.rows.together():
                for k, text in zip(missing, texts, strict=True):
                    row = self._row(keys[k], *questions[k], text.strip())
                    if isinstance(text, Unreadable):
                        row = self._unread(row)
                        keys[k] = row["key"]
                    self.rows.add(row)
        return [self._found(key) for key in keys]

    def _unread(self, row: Row) -> Row:
        """The row of a reply that could not be read: the question's own key stays free for a later run."""
        key = row["key"]
        free = next(
            name for n in range(len(self.rows) + 1) if (name := f"{key}-malformed-{n}") not in self.rows
        )
        return row | {"key": free, "instead_of": key, "state": "malformed"}

    def _key(self, q: _Question) -> str:
        return digest_of(
            [self.common["job"], q.kind, q.round, q.messages, q.principle, q.parent, q.copy],
        )

    def _row(self, key: str, q: _Question, root: Row | None, text: str) -> Row:
        state = "ok" if text else "empty"
        if q.kind == "revision" and text and text.split() == q.revises.split():
            state = "identical"
        asked = messages_of(q.messages)
        return {
            **{"key": key, "kind": q.kind, "round": q.round, "state": state, "text": text},
            **{"prompt": root["prompt"] if root else asked, "messages": asked, "principle": q.principle},
            **{"parent": q.parent, "root": root["key"] if root else key, "copy": q.copy},
            **self.common,
            "engine": self.engine.name,
            "sampling": {"temperature": self.settings.temperature, "seed": seed_from(key)},
        }

    def _found(self, key: str) -> Row:
        row = self.rows.get(key)
        assert row is not None  # just added, or seen above
        return row


def revise(
    prompts: Sequence[str | Chat],
    constitution: Constitution,
    engine: Engine,
    path: str | Path,
    settings: Revising | None = None,
) -> RevisionSummary:
    """Answer, criticise and revise; rows go to ``path``, and what is there already is not made again.

    A prompt is a user's message or a conversation that ends with one. With ``rounds=0`` prompts are only
    answered: that is how a model makes helpful data of its own. Raises what the engine raises (an endpoint
    that is down, a spent budget: run it again to go on), and as `Rows`.
    """
    settings = settings or Revising()
    copies: Counter[str] = Counter()
    starts: list[_Question] = []
    for prompt in prompts:
        chat = _conversation(prompt)
        name = digest_of(chat)
        starts.append(_Question("answer", 0, chat, "", "", copies[name], ""))
        copies[name] += 1
    with Rows(path) as rows:
        job = _Job(engine, constitution, settings, rows)
        for at in range(0, len(starts), settings.chunk):
            answers = job.ask([(q, None) for q in starts[at : at + settings.chunk]])
            _rounds(job, [row for row in answers if row["state"] == "ok"])
        return summarise([row for row in rows if row["job"] == job.common["job"]])


def _rounds(job: _Job, answers: list[Row]) -> None:
    """Take answers through all rounds, side by side."""
    last = list(answers)  # the last text of each chain that is worth revising
    for number in range(1, job.settings.rounds + 1):
        if not answers:
            return
        drawn = [
            job.constitution.draw(generator("principle", job.settings.seed, a["key"], number))[0]
            for a in answers
        ]
        critiques = job.ask(
            [
                (
                    _Question(
                        "critique",
                        number,
                        (*_talk(job, answer, text), ("user", principle.critique)),
                        *(principle.id, text["key"], answer["copy"], ""),
                    ),
                    answer,
                )
                for answer, text, principle in zip(answers, last, drawn, strict=True)
            ]
        )
        # A chain whose critique or revision could not be read waits for the next run.
        going = [k for k, critique in enumerate(critiques) if critique["state"] != "malformed"]
        answers, last, critiques = ([some[k] for k in going] for some in (answers, last, critiques))
        drawn = [drawn[k] for k in going]
        revisions = job.ask(
            [
                (
                    _Question(
                        "revision",
                        number,
                        (
                            *_plain(critique["messages"]),
                            *(("assistant", critique["text"]), ("user", principle.revision)),
                        ),
                        *(principle.id, critique["key"], answer["copy"], text["text"]),
                    ),
                    answer,
                )
                for answer, text, critique, principle in zip(answers, last, critiques, drawn, strict=True)
            ]
        )
        last = [new if new["state"] == "ok" else old for old, new in zip(last, revisions, strict=True)]
        going = [k for k, revision in enumerate(revisions) if revision["state"] != "malformed"]
        answers, last = ([some[k] for k in going] for some in (answers, last))


def _talk(job: _Job, answer: Row, text: Row) -> tuple[tuple[str, str], ...]:
    """The conversation that is criticised: worked examples, the prompt, and the text as the answer to it."""
    return (*job.shots, *_plain(answer["prompt"]), ("assistant", text["text"]))


def worked_examples(constitution: Constitution, n: int) -> tuple[tuple[str, str], ...]:
    """``n`` worked critiques and revisions as turns of one conversation. `UsageError` if there are fewer."""
    shots = [
        (
            ("user", e.prompt),
            ("assistant", e.answer),
            ("user", constitution[e.principle].critique),
            ("assistant", e.critique),
            ("user", constitution[e.principle].revision),
            ("assistant", e.revision),
        )
        for e in constitution.examples
    ]
    found = [*shots, *constitution.chats]
    if n > len(found):
        raise UsageError(
            f"{n} worked examples are asked for and the constitution '{constitution.name}' has {len(found)}; "
            "add [[example]] tables to it, or ask for fewer shots"
        )
    return tuple(turn for shot in found[:n] for turn in shot)


def summarise(rows: Sequence[Row]) -> RevisionSummary:
    """Count rows by what became of them."""
    rows = standing(rows)
    unread = sum(r["state"] == "malformed" for r in rows)
    rows = [r for r in rows if r["state"] != "malformed"]
    revisions = [r for r in rows if r["kind"] == "revision"]
    answers = [r for r in rows if r["kind"] == "answer"]
    states = Counter(r["state"] for r in revisions)
    by: dict[str, dict[str, int]] = {}
    for r in revisions:
        of = by.setdefault(r["principle"], {"ok": 0, "empty": 0, "identical": 0})
        of[r["state"]] += 1
    return RevisionSummary(
        rows=len(rows),
        answers=len(answers),
        empty_answers=sum(r["state"] == "empty" for r in answers),
        revisions={s: states[s] for s in ("ok", "empty", "identical")},
        by_principle=dict(sorted(by.items())),
        usable=rate(states["ok"], len(revisions)) if revisions else None,
        malformed=unread,
    )


def standing(rows: Sequence[Row]) -> list[Row]:
    """Rows without those of unreadable replies that a later run read, or could not read again."""
    read = {r["key"] for r in rows}
    last = {r["instead_of"]: r["key"] for r in rows if "instead_of" in r}
    return [
        r
        for r in rows
        if "instead_of" not in r or (r["instead_of"] not in read and last[r["instead_of"]] == r["key"])
    ]


def job_rows(path: str | Path, job: str | None = None) -> list[Row]:
    """The rows of one job. `DataError` if the file holds several and none is named, or lacks the named."""
    rows = read_rows(path)
    jobs = list(dict.fromkeys(str(r.get("job", "")) for r in rows))
    if job is None and len(jobs) > 1:
        raise DataError(
            f"{path} holds the rows of {len(jobs)} jobs (other models, constitutions or settings): name one "
            f"of {', '.join(j[:16] for j in jobs)}"
        )
    if job is not None:
        found = [j for j in jobs if j.startswith(job)]
        if len(found) != 1:
            raise DataError(
                f"{path} has no job {job!r}; it has {', '.join(j[:16] for j in jobs) or 'no rows'}"
            )
        rows = [r for r in rows if r["job"] == found[0]]
    return standing(rows)


def _conversation(prompt: str | Chat) -> tuple[tuple[str, str], ...]:
    chat = (("user", prompt),) if isinstance(prompt, str) else _plain(prompt)
    if not chat or chat[-1][0] != "user" or not chat[-1][1].strip():
        raise DataError(f"a prompt must be or end with a user's message: {str(prompt)[:80]!r}")
    return chat


def _plain(messages: Sequence[Message] | Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(m["role"]), str(m["content"])) for m in messages)
