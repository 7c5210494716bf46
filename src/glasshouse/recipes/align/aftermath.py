"""What a run of phases leaves for its report: answers before and after every phase, and what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.rng import generator
from glasshouse.model import GPT
from glasshouse.recipes.align import gold
from glasshouse.recipes.align.prompts import as_chat
from glasshouse.recipes.align.work import Work
from glasshouse.tokenizer import Message

ASKED = 4  # prompts whose answers are shown
EXAMINED = 200  # red-team prompts, and as many harmless ones, in the closed language


def tell(work: Work) -> dict[str, Any]:
    """Write evals/samples.json and evals/phases.json and ledger them. Safe to repeat; returns the latter."""
    models = looks(work)
    samples: list[dict[str, Any]] = []
    found: dict[str, Any] = {"phases": [e["body"] for e in work.ledger.entries("phase")], "measured": {}}
    asked = shown(work)
    for name, update, model in models:
        answers = written(work, model, asked)
        row = {"checkpoint": name, "stage": name, "update": update}
        samples += [
            {**row, "prompt": p[-1]["content"], "answer": a} for p, a in zip(asked, answers, strict=True)
        ]
        if work.closed:
            found["measured"][name] = measured(work, model).rows()
    for name, value in {"samples.json": samples, "phases.json": found}.items():
        write_json(work.run.evals / name, value)
    artifacts = {f"evals/{n}": sha256_file(work.run.evals / n) for n in ("samples.json", "phases.json")}
    if not any(e["body"].get("artifacts") == artifacts for e in work.ledger.entries("evidence")):
        work.ledger.append("evidence", {"artifacts": artifacts, "measured": found["measured"]})
    return found


def looks(work: Work) -> list[tuple[str, int, GPT]]:
    """(name, update, model) before the phases and after each stage of them that has ended."""
    found = [("before", 0, work.base())]
    if work.grown and (checkpoint := work.trained(work.grown[-1])) is not None:
        found = [(work.grown[-1].name, checkpoint.update, work.base())]
    for stage in (work.supervised, work.policy):
        if stage is not None and (checkpoint := work.trained(stage)) is not None:
            found.append((stage.name, checkpoint.update, work.after(stage)))
    return found


def shown(work: Work) -> list[list[Message]]:
    """The same few prompts for every model: of unseen combinations in the closed language."""
    if not work.closed:
        every = work.prompts.red_team
        return every[:: max(1, len(every) // ASKED)][:ASKED]
    rng = generator("align-shown", 0)
    half = ASKED // 2
    some = [*gold.red_team(rng, half, (), "unseen"), *gold.safe(rng, ASKED - half, (), "unseen")]
    return [as_chat(p.text) for p in some]


def written(work: Work, model: GPT, prompts: Sequence[Sequence[Message]]) -> list[str]:
    """The most likely answers."""
    return work.engine(model, "report").write(prompts, work.align.revising.answer_tokens)


def measured(work: Work, model: GPT, n: int = EXAMINED) -> gold.Examined:
    """What the grammar says of a model of the closed language, on unseen combinations."""
    prompts = gold.examination(work.recipe.seed, work.strays, n)
    answers = written(work, model, [as_chat(p.text) for p in prompts])
    return gold.examine(prompts, answers, work.constitution)
