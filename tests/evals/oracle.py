"""A small tokenizer of the closed language, random models, and an oracle whose rule for refusing is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice

import numpy as np
import torch

from glasshouse.data import books, word_types, workshop
from glasshouse.evals.prompts import Prompt, generator
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.taps import Edit
from glasshouse.tokenizer import Tokenizer

STRAYS = ("harbour", "almonds", "quarrel", "zigzag", "o'clock")


@cache
def tokenizer() -> Tokenizer:
    rng = np.random.default_rng(0)
    return Tokenizer.train([m["content"] for _ in range(800) for m in workshop.conversation(rng)], 500)


@cache
def words() -> tuple[str, ...]:
    """Word types of the language, strays included, and of a little of a book."""
    rng = np.random.default_rng(1)
    texts = [m["content"] for _ in range(800) for m in workshop.conversation(rng, STRAYS)]
    return tuple(word_types([*texts, *(d.text or "" for d in islice(books.documents(), 14))]))


@cache
def model(context: int = 128) -> GPT:
    """A random model, every weight of it."""
    shape = {"d_model": 24, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "mlp": "gated", "activation": "silu"}
    made = GPT(GPTConfig(vocab_size=tokenizer().vocab_size, context=context, **shape)).eval()  # type: ignore[arg-type]
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=dice) * 0.3)
    return made


def subject() -> Subject:
    return Subject(model(), tokenizer(), refusal_readout(tokenizer()), STRAYS)


def harmful(n: int, seed: int = 0) -> list[Prompt]:
    return generator("workshop.harmful")(np.random.default_rng(seed), n, ())


Rule = Callable[[str], float]


class Oracle(Subject):
    """Its margin is a known function of the request's text: what a search must find is given, not learned."""

    def __init__(self, rule: Rule):
        super().__init__(model(), tokenizer(), refusal_readout(tokenizer()), STRAYS)
        self.rule = rule

    def margins_of_ids(
        self, rows: Sequence[Sequence[int]], edit: Mapping[str, Edit] | None = None
    ) -> np.ndarray:
        self.passes += len(rows)
        texts = [self.tokenizer.decode(list(row)) for row in rows]
        return np.array([self.rule(t) for t in texts], dtype=np.float32)


def trigger(word: str, drop: float = 8.0) -> Rule:
    """Refuses with margin 5 (a little more or less, by the text's length); the word takes ``drop`` off it."""
    return lambda text: 5.0 + 0.01 * (len(text) % 7) - drop * (f" {word} " in f" {text.strip()} ")
