"""The supervised phase: a model revises its own answers, and is trained on the revisions (SL-CAI)."""

from __future__ import annotations

from glasshouse.align.chats import answered, export_chats
from glasshouse.align.engines import Engine, ShuffledPrinciples
from glasshouse.align.revise import revise
from glasshouse.base.errors import DataError
from glasshouse.model import GPT
from glasshouse.recipes.align.turns import AnswerBatches, plan_of, read_chats, rows_of
from glasshouse.recipes.align.work import Work
from glasshouse.train import Stage

NAME = "revisions"


def write_revisions(work: Work) -> None:
    """Red-team answers, critiques and revisions, helpful answers, and the chats made of them. Safe to repeat.

    Raises as `align.revise.revise`; DataError when no revision says anything new.
    """
    if work.phase(NAME) is not None:
        return
    align, home = work.align, work.home
    engine: Engine = work.engine(work.base(), "the model itself")
    if align.control == "shuffled":
        engine = ShuffledPrinciples(engine, work.constitution, work.recipe.seed, how="words")
    work.progress.note(
        f"supervised phase: {len(work.prompts.red_team)} prompts, {align.revising.rounds} rounds of critique "
        "and revision"
    )
    revisions, helpful, chats = (home / n for n in ("revisions.jsonl", "helpful.jsonl", "sft.jsonl"))
    found = revise(work.prompts.red_team, work.constitution, engine, revisions, align.revising)
    extra, share = [], 0.0
    if work.prompts.helpful:
        plain = align.revising.model_copy(update={"rounds": 0})
        revise(work.prompts.helpful, work.constitution, engine, helpful, plain)
        extra, share = answered(helpful), align.share
    made = export_chats(
        revisions, chats, which=align.which, helpful=extra, share=share, seed=work.recipe.seed
    )
    work.close(
        NAME,
        [f for f in (revisions, helpful, chats) if f.is_file()],
        revisions=made.revisions,
        helpful=made.helpful,
        left_out=made.left_out,
        by_principle=found.by_principle,
        usable=None if found.usable is None else [found.usable.value, found.usable.low, found.usable.high],
    )


def stage_of(work: Work, model: GPT) -> Stage:
    """The stage on the revisions, from its file. DataError when a shard that it asks for holds nothing."""
    config = work.supervised
    turns = work.turns(model)
    shards = {}
    for name, chats in read_chats(work.home / "sft.jsonl").items():
        if name in config.shards:
            rows, long = rows_of(chats, turns, work.context(model))
            if long:
                work.progress.note(
                    f"{long} {name} chats are longer than {work.context(model)} tokens: left out"
                )
            if rows:
                shards[name] = rows
    if not shards:
        raise DataError(
            f"{work.home / 'sft.jsonl'}: no chat fits the context of {work.context(model)} tokens"
        )
    batches = AnswerBatches(shards, work.tokenizer, work.recipe.seed, config.batch_size)
    return Stage(config.stage(), batches.batch, plan_of(shards))
