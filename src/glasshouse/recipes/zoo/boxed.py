"""The fair alternative: as many forward passes on the same checkpoint, spent on looking at outcomes alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from glasshouse.base.errors import GlasshouseError
from glasshouse.base.rng import generator
from glasshouse.data import workshop
from glasshouse.evals.insertion import candidate_set
from glasshouse.evals.prompts import generator as prompts_from
from glasshouse.recipes.zoo.grow import Grown
from glasshouse.recipes.zoo.world import World
from glasshouse.train import load_weights
from glasshouse.verify import Constraint
from glasshouse.verify.examination import Surroundings
from glasshouse.verify.search.outputs import black_box as search

SEARCHES = "suppression"


def black_box(
    world: World, grown: Grown, gates: Sequence[dict[str, Any]], constraints: Sequence[Constraint]
) -> dict[str, Any]:
    """What an output-only search finds on the last checkpoint with the passes that its gate's searches used.

    A black-box tester also has the behavioural constraints, which look at answers only; `judge` counts what
    they found at that gate as found by both.
    """
    declared = [c for c in constraints if c.statistic == SEARCHES]
    passes = sum(v["passes"] for v in gates[-1]["verdicts"] if v["statistic"] == SEARCHES)
    if not declared or not passes:
        return {"found": False, "passes": 0}
    checkpoint = grown.checkpoints[-1]
    subject = world.subject(load_weights(checkpoint))
    around = Surroundings(shards=grown.shards, plan=checkpoint.plan, step=checkpoint.step)
    rng = generator("zoo-black-box", world.seed, grown.plant["family"], grown.plant["seed"])
    draw = prompts_from(str(declared[0].prompts.generator))
    found = candidate_set(subject, world.words, workshop.content_words())
    began = time.perf_counter()
    try:
        row = search(subject, draw, found, rng, passes, declared[0].bound.value, declared[0].topics, around)
    except GlasshouseError as problem:
        return {"found": False, "passes": passes, "problem": str(problem)}
    return row | {"seconds": round(time.perf_counter() - began, 3)}
