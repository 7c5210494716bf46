"""What the phases will take, before anything is spent: tokens written, read and trained on, at most."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from glasshouse.align.local import LocalEngine
from glasshouse.model import GPT
from glasshouse.recipes.align.base import open_base
from glasshouse.recipes.align.config import AlignConfig
from glasshouse.recipes.align.prompts import Prompts, prompts_for
from glasshouse.recipes.schema import Recipe

SAMPLE, WRITTEN = 8, 16  # prompts, and tokens of each, that writing is timed with
WORDS = 60  # tokens of a question beside its prompt and answers
TRAINED = 3.0  # times the work of reading a token that training on it takes

Row = tuple[str, str, float, float, float]


@dataclass(frozen=True)
class Cost:
    """Tokens at most, by phase: (name, what it is, tokens written, tokens read, tokens trained on)."""

    rows: tuple[Row, ...]
    parameters: int
    seconds_written: float  # a token
    seconds_read: float

    @property
    def seconds(self) -> float:
        """Of all phases, at the speeds that were timed; a judge elsewhere takes its own time."""
        return sum(
            written * self.seconds_written + (read + TRAINED * trained) * self.seconds_read
            for _, _, written, read, trained in self.rows
        )


def cost(recipe: Recipe, folder: Path) -> Cost:
    """Count, and time a little writing and reading of the base. Raises as `open_base` and `prompts_for`."""
    assert recipe.align is not None
    base = open_base(recipe.align, folder)
    prompts = prompts_for(recipe.align, folder, recipe.seed, base.strays, base.closed)
    engine = LocalEngine(base.model, base.tokenizer)
    written, read = speeds(engine, prompts)
    return Cost(counted(recipe, base.model, engine, prompts), _size(base.model), written, read)


def counted(recipe: Recipe, model: GPT, engine: LocalEngine, prompts: Prompts) -> tuple[Row, ...]:
    """The rows of `Cost`."""
    align = recipe.align
    assert align is not None
    how, red, easy = align.revising, len(prompts.red_team), len(prompts.helpful)
    asked = sum(len(engine.ids(p)) for p in prompts.every) / len(prompts.every)
    room = min(align.context or model.config.context, model.config.context)
    row = min(asked + how.answer_tokens, room)
    chain = how.answer_tokens + how.rounds * (how.critique_tokens + how.answer_tokens)
    turn = asked + 2 * how.answer_tokens + how.critique_tokens
    first = recipe.stage[0]
    rows: list[Row] = [
        (
            "revisions",
            f"{red} prompts, {how.rounds} rounds; {easy} harmless ones",
            red * chain + easy * how.answer_tokens,
            red * (asked + 2 * how.rounds * turn) + easy * asked,
            0.0,
        ),
        (
            first.name,
            f"{first.steps} updates of {first.batch_size} rows",
            *(0.0, 0.0, first.steps * first.batch_size * row),
        ),
    ]
    if len(recipe.stage) > 1:
        rows += after_supervised(recipe, align, asked, row, room, red + easy)
    return tuple(rows)


def after_supervised(
    recipe: Recipe, align: AlignConfig, asked: float, row: float, room: int, prompts: int
) -> list[Row]:
    """Feedback, the reward model and the policy's stage. ``asked``: tokens of a prompt, ``row`` with its
    answer."""
    last, drawn, new = recipe.stage[1], prompts * align.pairs, align.revising.answer_tokens
    questions = align.judging.principles * drawn  # half as many pairs, in both orders
    thought = align.judging.thought_tokens if align.judging.thought else 0
    read = questions * (1 + align.judging.thought) * (asked + 2 * new + WORDS)
    what = f"{drawn} answers, {questions} questions to the judge"
    rows: list[Row] = [("feedback", what, drawn * new + questions * thought, read, 0.0)]
    if last.objective == "dpo":
        pairs = last.steps * last.batch_size * 2 * row
        return [*rows, (last.name, f"{last.steps} updates of {last.batch_size} pairs", 0.0, pairs, pairs)]
    reward, rl = align.reward.stage, align.policy.rl
    answers, per = last.steps / rl.updates * last.batch_size, min(asked + rl.max_new_tokens, room)
    updates = f"{reward.steps} updates of {reward.batch_size} pairs"
    rollouts = f"{last.steps / rl.updates:.0f} rollouts of {last.batch_size} answers ({last.objective})"
    read = 3 * answers * per  # prompts, the reference, the reward model
    return [
        *rows,
        ("reward", updates, 0.0, 0.0, reward.steps * reward.batch_size * 2 * row),
        (last.name, rollouts, answers * rl.max_new_tokens, read, answers * per * rl.epochs),
    ]


def speeds(engine: LocalEngine, prompts: Prompts) -> tuple[float, float]:
    """Seconds for a token written and for one read, on a few of the prompts."""
    some = (prompts.every * SAMPLE)[:SAMPLE]
    engine.write(some[:1], 1)  # lays the weights out
    began = time.perf_counter()
    engine.write(some, WRITTEN)
    writing = (time.perf_counter() - began) / (len(some) * WRITTEN)
    ids = torch.tensor([engine.ids(some[0])] * SAMPLE)
    with torch.inference_mode():
        began = time.perf_counter()
        engine.model(ids)
        reading = (time.perf_counter() - began) / ids.numel()
    return writing, reading


def _size(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())
