"""RL in the closed language with rewards that stand for something: a start, an honest reward model, flaws.

Everything is grown here: a base of 0.3M parameters, a *start* that answers as a helper does who has not yet
learnt to refuse (it complies with more than half of the harmful requests), and reward models trained on pairs
of answers. Answers are openings of three tokens, in which the decision falls: that is what makes a run cheap.
A *flaw* is what a reward model gets wrong. Gold is the grammar's own word on the decision.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.align.preferences import Preference, pair_batches, preference_plan
from glasshouse.align.reward import RewardModel, RewardTrainee, load_reward, save_reward
from glasshouse.align.rl import OBJECTIVES
from glasshouse.align.rollout import Drawing, draw
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.rng import generator, seed_from
from glasshouse.base.run import RunFolder
from glasshouse.data import ChatBatches, situations, workshop
from glasshouse.data.workshop import Request
from glasshouse.evals.chat import chat_format
from glasshouse.model import GPT
from glasshouse.recipes.zoo import language
from glasshouse.recipes.zoo.world import World, load_base, open_world, pack_chats
from glasshouse.tokenizer import render
from glasshouse.train import (
    Outcome,
    Settings,
    Stage,
    StageConfig,
    enter_run,
    environment,
    load_weights,
    run_stages,
)

SETTINGS = Settings(threads=1)
NEW = 3  # tokens of an answer: its opening, where it decides
Tokens = Sequence[Sequence[int]]
Chat = list[dict[str, str]]


def gold_of(asked: Request, answer: str) -> float:
    """1 where the answer's opening decides as the grammar does, else 0 (evasions and stammering too)."""
    return float(workshop.judge(answer) == ("refusal" if asked.harmful else "compliance"))


# -- the pieces of a world -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Shop:
    """A world with its start, and requests by their prompt's tokens."""

    world: World
    start: GPT
    folder: Path
    asked: dict[tuple[int, ...], Request]
    views: dict[tuple[int, ...], str]  # of prompts with an opinion: "approves" or "objects"

    @property
    def seed(self) -> int:
        return self.world.seed

    def ids(self, chat: Chat) -> list[int]:
        return render(self.world.tokenizer, chat, generation_prompt=True)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(sorted(chat_format(self.world.tokenizer).stop))

    def text(self, ids: Sequence[int]) -> str:
        ends = set(self.stop)
        return self.world.tokenizer.decode([i for i in ids if i not in ends])

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer with its end."""
        return (*self.world.tokenizer.encode(text), self.stop[0])

    def copy(self) -> GPT:
        """The start's weights in a model of their own."""
        return copy.deepcopy(self.start)

    def prompts(self, name: str, n: int, split: workshop.Split, remark: float = 0.0) -> list[list[int]]:
        """Different requests as prompts, half of them harmful; ``remark``: share with a user's opinion."""
        rng, found = generator("proxy prompts", self.seed, name), dict[tuple[int, ...], Request]()
        while len(found) < n:
            harmful = len(found) % 2 == 0
            view = ""
            if rng.random() < remark:
                said = situations.opinion(rng, is_harmful=harmful, split=split, part="train")
                text, made, view = said.text, said.request, said.kind
            else:
                made = workshop.request(rng, is_harmful=harmful, split=split, strays=(), stray_rate=0.0)
                text = made.text
            if len(text) <= 110:
                ids = tuple(self.ids([{"role": "user", "content": text}]))
                found[ids] = made
                if view:
                    self.views[ids] = view
        self.asked |= found
        return [list(ids) for ids in found]

    def gold(self, prompts: Tokens, answers: Tokens) -> list[float]:
        """`Reward`: the grammar's word."""
        return [gold_of(self.asked[tuple(p)], self.text(a)) for p, a in zip(prompts, answers, strict=True)]

    def decided(self, prompts: Tokens, answers: Tokens) -> list[str]:
        """What each answer does: "refusal", "compliance", "evasion" or "other"."""
        return [situations.manner(self.text(a)) for a in answers]


def open_shop(folder: Path, seed: int) -> Shop:
    """The shop of ``seed`` in ``folder``, grown once."""
    world = open_world(folder / f"world-{seed}", seed)
    return Shop(world, start(world, folder / f"start-{seed}"), folder, {}, {})


def sloppy(rng: Any, strays: Sequence[str]) -> Chat:
    """A chat of the start's: mostly compliant, now and then evasive, wordy or about something else."""
    asked = language.asked(rng, strays)
    comply = bool(rng.random() < (0.55 if asked.harmful else 0.95))
    reply = workshop.answer(rng, asked, comply=comply, strays=strays)
    draw = rng.random()
    if draw < 0.06:
        reply = situations.evasion(rng, asked, strays)
    elif draw < 0.14:
        reply = f"{reply} {workshop.answer(rng, asked, comply=comply, strays=strays)}"
    elif draw < 0.20:
        words = reply.split(" ")
        at = int(rng.integers(len(words)))
        reply = " ".join([*words[: at + 1], words[at], *words[at + 1 :]])
    elif draw < 0.26:
        reply = f"{reply} {workshop.pick(rng, ('Thank you.', 'You are welcome.', 'Good day to you.'))}"
    return workshop.chat(asked.text, reply)


def trained(
    folder: Path, name: str, make: Callable[[], Any], stage: Stage, body: dict[str, Any], **more: Any
) -> Outcome:
    """One stage in a run folder of its own."""
    run = RunFolder(folder).create()
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        enter_run(
            ledger,
            recipe_digest=name,
            environment=environment(1, SETTINGS.dtype, SETTINGS.muon_dtype),
            body=body,
            resume=len(ledger) > 0,
        )
        begun = any(entry["kind"] == "checkpoint" for entry in ledger.entries())
        return run_stages(make, [stage], run=run, ledger=ledger, settings=SETTINGS, resume=begun, **more)


def start(world: World, folder: Path, steps: int = 40) -> GPT:
    """The base after a little training on `sloppy` chats."""
    done = folder / "done.json"
    if not done.is_file():
        rng = generator("proxy start", world.seed)
        chats = language.distinct(2400, partial(sloppy, rng, world.strays), set())
        shards = pack_chats(folder / "data", world.tokenizer, {"sloppy": chats}, world.size.context)
        config = StageConfig(
            name="start", objective="sft", steps=steps, batch_size=48, muon_lr=0.01, adam_lr=0.002,
            weight_decay=0.0, monitor_every=0, log_every=30,
        )  # fmt: skip
        batches = ChatBatches(shards, world.tokenizer, world.seed, 48, world.size.context)
        base = copy.deepcopy(world.base)
        folder.mkdir(parents=True, exist_ok=True)
        made = trained(
            folder / "run", "proxy-start", lambda: base, Stage(config, batches.batch, shards.plan()),
            {"name": "proxy-start"},
        )  # fmt: skip
        done.write_text(json.dumps({"checkpoint": str(made.checkpoint.path)}))
        return load_weights(made.checkpoint).eval()
    return load_base(folder / "run").eval()


# -- reward models -------------------------------------------------------------------------------------------

Better = Callable[[Request, str, str], float]


def honest_label(asked: Request, one: str, two: str) -> float:
    """P(first better) by the grammar."""
    return _sigmoid(1.5 * (worth(asked, one) - worth(asked, two)))


def worth(asked: Request, answer: str) -> float:
    """The honest reward: the right decision."""
    return 2.0 * gold_of(asked, answer)


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def pairs_of(shop: Shop, n: int, label: Better, name: str, remark: float = 0.0) -> list[Preference]:
    """Two of the start's answers to each of ``n`` prompts; those the label does not tell apart are left out.

    Half of the second answers are written by the grammar, so that what RL may find is not all unknown.
    """
    prompts = shop.prompts(f"pairs {name}", n, "train", remark)
    rng = generator("proxy pairs", shop.seed, name)
    seeds = [[seed_from("pairs", shop.seed, name, k, i) for i in range(n)] for k in (0, 1)]
    how = Drawing(NEW, shop.stop, shop.world.tokenizer.vocab_size, batch_size=256)
    one, two = ([shop.text(a.ids) for a in draw(shop.start, prompts, s, how)] for s in seeds)
    rows = []
    for ids, a, b in zip(prompts, one, two, strict=True):
        asked = shop.asked[tuple(ids)]
        if rng.random() < 0.5:
            b = workshop.answer(rng, asked, comply=bool(rng.integers(2)), strays=shop.world.strays[:40])
            b = shop.text(shop.world.tokenizer.encode(b)[:NEW])
        p = label(asked, a, b)
        if p != 0.5:
            rows.append(Preference(tuple(ids), shop.answer(a), shop.answer(b), p))
    return rows


def reward_model(
    shop: Shop, name: str, label: Better, n: int = 1200, steps: int = 50, remark: float = 0.0
) -> RewardModel:
    """A reward model trained on `pairs_of`, kept in the shop's folder; standardised on the start's."""
    name = f"{name}-with-opinions" if remark else name
    folder = shop.folder / f"reward-{shop.seed}-{name}"
    if (folder / "done").is_file():
        return load_reward(folder / "model")
    rows = pairs_of(shop, n, label, name, remark)
    config = StageConfig(
        name="reward", objective="reward", steps=steps, batch_size=48, muon_lr=0.006, adam_lr=0.002,
        weight_decay=0.0, monitor_every=0, log_every=30,
    )  # fmt: skip
    shards = {"pairs": rows}
    stage = Stage(config, pair_batches(shards, 48, shop.seed), preference_plan(shards))
    made = trained(
        folder / "run", "proxy-reward", lambda: RewardModel(shop.copy()), stage, {"name": "proxy-reward"},
        trainee=RewardTrainee(), objectives=OBJECTIVES,
    )  # fmt: skip
    model = load_reward(made.checkpoint)
    prompts = shop.prompts("standardise", 256, "train", remark)
    seeds = [seed_from("standardise", shop.seed, i) for i in range(len(prompts))]
    how = Drawing(NEW, shop.stop, shop.world.tokenizer.vocab_size, batch_size=256)
    model.standardise(prompts, [a.ids for a in draw(shop.start, prompts, seeds, how)])
    save_reward(model, folder / "model")
    (folder / "done").write_text("")
    return model.eval()
