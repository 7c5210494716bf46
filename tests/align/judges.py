"""Judges with known habits: a small real model that answers with a letter, and readers of the question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from evals import oracle
from glasshouse.align.constitution import Constitution, Principle
from glasshouse.align.engines import Chat, seeds_for
from glasshouse.align.feedback import Pair
from glasshouse.align.local import LocalEngine
from glasshouse.base.digest import digest_of
from glasshouse.model import GPT

TOK = oracle.tokenizer()


@cache
def letters(lean: float = 0.0, context: int = 512) -> GPT:
    """A random model that answers with A or B; by its own noise, or ``lean`` nats more often with A."""
    made = oracle.model(context)
    model = GPT(made.config.model_copy(update={"tied": False})).eval()
    model.load_state_dict(made.state_dict() | {"head.weight": made.head_weight.detach().clone()})
    a, b = TOK.encode("A")[0], TOK.encode("B")[0]
    asked = [f"Choose. {w} Which of the two answers is the one to choose? A or B alone." for w in "xyzuvw"]
    with torch.no_grad():
        rows = [LocalEngine(model, TOK).ids([{"role": "user", "content": t}]) for t in asked]
        middle = torch.stack([model.hidden(torch.tensor([r]))[0, -1] for r in rows]).mean(0)
        weight = model.head_weight
        up = middle / middle.dot(middle)  # raises a logit by 1 for a middling question
        noise = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)) * 0.1
        noise = noise - up * noise.dot(middle)  # by itself it leans to neither
        weight[a] = up * (16 + lean) + noise
        weight[b] = up * 16 - noise
    return model


def judge(lean: float = 0.0) -> LocalEngine:
    return LocalEngine(letters(lean), TOK, name="a small judge")


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pairs(n: int) -> list[Pair]:
    """Pairs of which one answer is kind and one is rude, the kind one first in every other."""
    made = []
    for k in range(n):
        kind, rude = f"Gladly, take spoon {k}.", f"Silly you, spoon {k}."
        first, second = (kind, rude) if k % 2 == 0 else (rude, kind)
        made.append(Pair(asked(f"How do I warm egg {k}?"), first, second))  # type: ignore[arg-type]
    return made


def constitution(n: int = 3) -> Constitution:
    return Constitution(
        name="test",
        principles=tuple(
            Principle(
                id=f"p{k}", critique=f"Criticise {w}.", revision=f"Mend {w}.", preference=f"Prefer {w}."
            )
            for k, w in enumerate(("kindness", "brevity", "truth", "calm", "order")[:n])
        ),
    )


@dataclass
class Reader:
    """Judges by a rule about the question; writes by another. Counts what it was asked."""

    rule: Callable[[str], float]  # logit of A
    says: Callable[[Chat], str] = lambda prompt: "I see."
    name: str = "reader"
    digest: str = "reader"
    chosen: list[str] = field(default_factory=list)
    written: list[Chat] = field(default_factory=list)

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        assert len(seeds_for(prompts, seed)) == len(prompts)
        self.written += prompts
        return [self.says(p) for p in prompts]

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        assert list(options) == ["A", "B"]
        out = []
        for prompt in prompts:
            self.chosen.append("\n".join(m["content"] for m in prompt))
            z = self.rule(self.chosen[-1])
            out.append([] if math.isnan(z) else [-math.log1p(math.exp(-z)), -math.log1p(math.exp(z))])
        return out


def kind_is_a(question: str) -> float:
    """Logit 2 for A when the kind answer stands there, -2 when it is B."""
    return 2.0 if "Answer A: Gladly" in question else -2.0


def fingerprint(rows: Sequence[dict[str, object]]) -> str:
    return digest_of(sorted((str(r["key"]), str(r)) for r in rows))
