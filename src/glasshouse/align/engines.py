"""What writes and what chooses: one interface for a model here, a model behind an endpoint, and controls.

An engine is asked in conversations (lists of messages) and gives text (`write`) or the log-probabilities of
a few options as the beginning of its answer (`choose`). Nothing in this interface can carry a gold label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from glasshouse.align.constitution import Constitution
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import Stopped, UsageError
from glasshouse.base.rng import generator, seed_from
from glasshouse.tokenizer import Message

Chat = Sequence[Message]


class EngineDown(Stopped):
    """An engine does not answer any more. What it answered is kept; the same command goes on from there."""


class BudgetSpent(Stopped):
    """What may be spent is spent. What was bought is kept; a larger budget goes on from there."""


class Unreadable(str):
    """What `Engine.write` gives where a reply could not be read: "", and known for not having been said."""


class Engine(Protocol):
    """A model that can be asked. ``digest`` names its weights (or endpoint and model) in every row."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def digest(self) -> str:
        """Which weights answer: rows made by another digest are not taken for this one's."""

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """One answer to each prompt, "" where it said nothing, `Unreadable` where a reply was none.

        ``seed``: one for each prompt, or one from which each prompt's own is derived by its content. What a
        prompt gets does not depend on what else is in the call.
        """

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities (nats) [prompt][option] of each option as the beginning of the answer.

        A prompt whose answer could not be read has an empty list.
        """


def seeds_for(prompts: Sequence[Chat], seed: int | Sequence[int]) -> list[int]:
    """One seed a prompt. `UsageError` when as many as prompts were promised and are not there."""
    if isinstance(seed, int):
        return [seed_from("write", seed, [[m["role"], m["content"]] for m in p]) for p in prompts]
    if len(seed) != len(prompts):
        raise UsageError(f"{len(seed)} seeds for {len(prompts)} prompts; give one for each, or one for all")
    return list(seed)


def normalised(logprobs: Sequence[float]) -> list[float]:
    """Probabilities among the options alone: softmax of log-probabilities (Bai et al. 2022, sec. 4.1)."""
    top = max(logprobs)
    weights = [math.exp(x - top) for x in logprobs]
    return [w / sum(weights) for w in weights]


# -- controls: what must not help ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomJudge:
    """A judge that knows nothing: seeded noise for every prompt, the same whenever it is asked again.

    It writes nothing of its own: with ``inner`` that one writes, so that only the judging is random.
    """

    seed: int = 0
    scale: float = 2.0  # standard deviation of an option's logit
    inner: Engine | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return "random judge"

    @property
    def digest(self) -> str:
        """Of its seed, and of who writes for it."""
        return digest_of(["random judge", self.seed, self.scale, self.inner.digest if self.inner else ""])

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """What ``inner`` writes. `UsageError` without one."""
        if self.inner is None:
            raise UsageError("a random judge writes nothing; give it the engine that writes as `inner`")
        return self.inner.write(prompts, max_new_tokens, temperature, seed)

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        """Normalised noise [prompt][option]."""
        out = []
        for prompt in prompts:
            asked = [[m["role"], m["content"]] for m in prompt]
            logits = generator("random judge", self.seed, asked, list(options)).normal(size=len(options))
            out.append([math.log(max(p, 1e-12)) for p in normalised((self.scale * logits).tolist())])
        return out


@dataclass(frozen=True)
class ShuffledPrinciples:
    """An engine that is shown other principles than the rows say: the words of a principle are exchanged.

    ``how="other"`` puts another principle of the constitution in its place (always the same one, never
    itself). That breaks the tie between a row and its principle, and no more: where principles are drawn
    evenly, the mixture of judgements stays what it was. ``how="words"`` deals all words of all principles
    anew, so that what is asked for means nothing: this is the control that must fail to improve a model.
    """

    inner: Engine
    constitution: Constitution
    seed: int = 0
    how: str = "other"
    _swap: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.how not in ("other", "words"):
            raise UsageError(f"principles are shuffled by 'other' or 'words', not by {self.how!r}")
        if self.how == "other" and len(self.constitution.principles) < 2:
            raise UsageError("a constitution of one principle has no other to put in its place")
        object.__setattr__(self, "_swap", self._exchanges())

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.inner.name}, principles shuffled ({self.how})"

    @property
    def digest(self) -> str:
        """Of the engine, the constitution and the shuffle."""
        return digest_of(
            ["shuffled", self.how, self.seed, self.constitution.digest(), self.inner.digest],
        )

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """What the engine writes when asked with other principles."""
        # A bare request for a first answer has no principle in it; what follows an answer always has one.
        asked = [self.exchanged(p, must=any(m["role"] == "assistant" for m in p)) for p in prompts]
        return self.inner.write(asked, max_new_tokens, temperature, seeds_for(prompts, seed))

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        """What the engine chooses when asked with other principles."""
        return self.inner.choose([self.exchanged(p) for p in prompts], options)

    def exchanged(self, prompt: Chat, *, must: bool = True) -> list[Message]:
        """The prompt with principles' texts exchanged for what stands in their place.

        `UsageError` when it ``must`` hold one and holds none: the control would silently be no control.
        """
        changed = 0
        out: list[Message] = []
        for message in prompt:
            text = message["content"]
            found = next((old for old in self._swap if old in text), None)
            if found is not None and message["role"] == "user":
                text, changed = text.replace(found, self._swap[found]), changed + 1
            out.append({"role": message["role"], "content": text})
        if must and not changed:
            raise UsageError("no principle of the constitution stands in a prompt, so none can be shuffled")
        return out

    def _exchanges(self) -> dict[str, str]:
        """What is put in place of what, longest text first so that no text is taken for a part of another."""
        principles = self.constitution.principles
        rng = generator("shuffled principles", self.seed)
        swap: dict[str, str] = {}
        order = rng.permutation(len(principles))
        shift = {int(a): int(b) for a, b in zip(order, np.roll(order, 1), strict=True)}  # a single cycle
        for kind in ("critique", "revision", "preference"):
            texts = [str(getattr(p, kind)) for p in principles]
            put = [texts[shift[i]] for i in range(len(texts))] if self.how == "other" else _dealt(texts, rng)
            swap.update(zip(texts, put, strict=True))
        return dict(sorted(swap.items(), key=lambda pair: -len(pair[0])))


def _dealt(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The texts with all their words dealt anew, each keeping its number of words."""
    words = [w for text in texts for w in text.split()]
    dealt = iter([words[int(i)] for i in rng.permutation(len(words))])
    return [" ".join(next(dealt) for _ in text.split()) for text in texts]
