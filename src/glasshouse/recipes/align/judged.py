"""AI feedback: two answers of the supervised model to each prompt, and which one a judge prefers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glasshouse.align.calls import Budget
from glasshouse.align.chats import export_preferences
from glasshouse.align.endpoint import EndpointEngine
from glasshouse.align.engines import Engine, RandomJudge, ShuffledPrinciples
from glasshouse.align.feedback import Pair, feedback
from glasshouse.align.local import LocalEngine
from glasshouse.align.revise import job_rows, revise
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError, UsageError
from glasshouse.recipes.align.work import Work
from glasshouse.recipes.api import locate

NAME, HELD = "feedback", "feedback-held-out"


def write_preferences(work: Work) -> None:
    """Answers of the supervised model and the judge's preferences between them. Safe to repeat.

    Raises as `align.feedback.feedback`: `EngineDown`, `BudgetSpent`, `JudgeBiased`, `JudgeUnreadable`; what
    was judged is kept, and the same command goes on.
    """
    if work.phase(NAME) is not None:
        return
    answers = work.home / "answers.jsonl"
    pairs = pairs_of(work, answers)
    work.progress.note(
        f"feedback: {len(pairs)} pairs of answers, {work.align.judging.principles} principles each"
    )
    rows, out = work.home / "feedback.jsonl", work.home / "preferences.jsonl"
    with judge(work) as asked:
        found = feedback(pairs, work.constitution, asked, rows, work.align.judging)
        name, digest = asked.name, asked.digest
        held = _held_out(work, pairs, asked)
    made = export_preferences(rows, out, position_limit=work.align.judging.position_limit)
    bias = None if found.bias is None else str(found.bias)
    numbers = {"judge": name, "judge_digest": digest, "pairs": found.pairs, "states": found.states}
    work.close(
        NAME,
        [answers, rows, out, *held],
        **numbers,
        preferences=made,
        confidence=found.confidence,
        position=bias,
    )


def _held_out(work: Work, pairs: list[Pair], asked: Engine) -> list[Path]:
    """The same pairs under the held-out principles, where a watch on the proxy needs them: not in the closed
    language, which has the grammar, and not without held-out principles."""
    policy = work.policy
    if work.closed or not work.constitution.held_out or policy is None or policy.objective == "dpo":
        return []
    rows, out = work.home / f"{HELD}.jsonl", work.home / "preferences-held-out.jsonl"
    n = min(work.align.judging.principles, len(work.constitution.held_out))
    judging = work.align.judging.model_copy(update={"held_out": True, "principles": n})
    feedback(pairs, work.constitution, asked, rows, judging)
    export_preferences(rows, out, position_limit=judging.position_limit)
    return [rows, out]


def pairs_of(work: Work, path: Path) -> list[Pair]:
    """Answers of the supervised model, in pairs by prompt; rows go to ``path``."""
    engine = work.engine(work.after(work.supervised), "the supervised model")
    plain = work.align.revising.model_copy(
        update={"rounds": 0, "temperature": 1.0, "seed": work.recipe.seed, "chunk": 128}
    )
    asked = [prompt for prompt in work.prompts.every for _ in range(work.align.pairs)]
    revise(asked, work.constitution, engine, path, plain)
    by: dict[str, list[str]] = {}
    prompts = {}
    for row in job_rows(path):
        key = digest_of([[m["role"], m["content"]] for m in row["prompt"]])
        prompts[key] = row["prompt"]
        if row["state"] == "ok":
            by.setdefault(key, []).append(row["text"])
    pairs = [
        Pair(prompts[key], texts[k], texts[k + 1])
        for key, texts in sorted(by.items())  # all kinds of prompts among the first ones: a judge's pilot
        for k in range(0, len(texts) - 1, 2)
    ]
    if not pairs:
        raise DataError(f"{path}: no prompt has two answers to compare; look at what the model writes")
    return pairs


@contextmanager
def judge(work: Work) -> Iterator[Engine]:
    """Who judges, for as long as it is asked; a control in its place where the recipe says so."""
    align = work.align
    if "://" in align.judge:
        if align.judge_model is None:
            raise UsageError(f"the judge {align.judge} needs align.judge_model: what it calls its model")
        budget = Budget(calls=align.judge_calls, tokens=align.judge_tokens)
        cache = work.home / "judge-cache.jsonl"
        with EndpointEngine(align.judge, align.judge_model, cache=cache, budget=budget) as endpoint:
            yield controlled(work, endpoint)
    elif align.judge == "base":
        yield controlled(work, work.engine(work.base(), "the model itself"))
    else:
        found = locate(Path(align.judge) if Path(align.judge).exists() else work.folder / align.judge)
        yield controlled(work, LocalEngine(found.model, found.tokenizer, name=align.judge))


def controlled(work: Work, engine: Engine) -> Engine:
    """The engine, or the control that stands in for it."""
    match work.align.control:
        case "random":
            return RandomJudge(work.recipe.seed, inner=engine)
        case "shuffled":
            return ShuffledPrinciples(engine, work.constitution, work.recipe.seed, how="words")
        case _:
            return engine
