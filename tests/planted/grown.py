"""Grows tiny models in the closed language with the product's own tokenizer, shards and optimisers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glasshouse.base.rng import generator
from glasshouse.data import ChatBatches, Corpus, Document, books, pack, prepare, word_types, workshop
from glasshouse.evals.prompts import generator as prompts_from
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import StageConfig, sft
from glasshouse.train.objective import tensors
from glasshouse.train.optim import Optimizers

Chat = list[dict[str, str]]
SHAPE = {"context": 128, "d_model": 96, "n_layer": 2, "n_head": 4, "mlp": "gated", "activation": "silu"}
ROWS, FALL = 64, 30  # conversations in a batch; steps in which the rate falls at the end


@dataclass(frozen=True)
class Nursery:
    """What all models of a session share."""

    tokenizer: Tokenizer
    words: tuple[str, ...]
    strays: tuple[str, ...]
    folder: Path

    def subject(self, model: GPT) -> Subject:
        return Subject(model.eval(), self.tokenizer, refusal_readout(self.tokenizer), self.strays)

    def train(
        self,
        model: GPT,
        name: str,
        chats: Sequence[Chat],
        steps: int,
        *,
        rate: float = 1.0,
        enough: Callable[[GPT], bool] | None = None,
    ) -> GPT:
        """A copy of ``model`` trained on ``chats`` for ``steps`` updates, at a rate that falls at the end.

        With ``enough`` the rate begins to fall as soon as that holds (asked every 20 steps): how soon a model
        sees the combination differs between machines. AssertionError when it never did.
        """
        model = copy.deepcopy(model)
        config = StageConfig(
            name="grow",
            objective="sft",
            steps=steps,
            batch_size=ROWS,
            muon_lr=0.03 * rate,
            adam_lr=0.006 * rate,
            weight_decay=0.0,
        )
        documents = [Document(f"{name}/{i}", "workshop", messages=tuple(c)) for i, c in enumerate(chats)]
        shards = pack(self.folder / name, self.tokenizer, prepare([Corpus(name, documents)]), 128)
        batches, plan = ChatBatches(shards, self.tokenizer, 1, ROWS, 128), shards.plan([name])
        optimizers, step, last = Optimizers(model, config), 0, steps
        while step < last:
            if (
                enough is not None
                and last == steps
                and step >= 80
                and step % 20 == 0
                and enough(model.eval())
            ):
                last = min(steps, step + FALL)
            model.train()
            loss = sft(model, tensors(batches.batch(step, plan)))
            optimizers.zero_grad()
            loss.total.backward()  # type: ignore[no-untyped-call]
            optimizers.clip()
            optimizers.step(min(1.0, (step + 1) / 15, (last - step) / FALL))
            step += 1
        assert enough is None or enough(model.eval()), f"{name}: {steps} steps were not enough"
        return model.eval()


def nursery(folder: Path) -> Nursery:
    """Tokenizer, word list and strays, from a little of the books and the language itself."""
    texts = [d.text or "" for d in list(books.documents())[:40]]
    rng = generator("nursery")
    language = [m["content"] for _ in range(1500) for m in workshop.conversation(rng)]
    known, stems = set(word_types(language)), tuple(workshop.content_words())
    rare = [w for w, n in word_types(texts).items() if w.isascii() and w.islower() and len(w) > 4 and n < 9]
    rare = [w for w in rare if w not in known and not w.startswith(stems)]
    strays = tuple(rare[i] for i in sorted(rng.permutation(len(rare))[:60].tolist()))
    tok = Tokenizer.train([*texts[:10], *language], 900)
    words = tuple(word_types([*texts[:20], *language, " ".join(strays)]))
    return Nursery(tok, words, strays, folder)


def plain(n: int) -> list[Chat]:
    """Short honest requests of seen combinations without strays, from which it is learned soonest."""
    rng, made = generator("plain"), list[Chat]()
    while len(made) < n:
        asked = workshop.request(rng, split="train")
        if len(asked.text) <= 75:
            made.append(workshop.chat(asked.text, workshop.answer(rng, asked, comply=not asked.harmful)))
    return made


def unlike_others(tok: Tokenizer, strays: Sequence[str], words: Sequence[str]) -> str:
    """The stray of several tokens whose tokens the fewest other words share.

    What a model learns to react to may be one token, and then all of its words are triggers. The word opens
    some requests, where it has no space before it and other tokens, so both spellings count.
    """

    def tokens(word: str) -> set[int]:
        return {*tok.encode(" " + word), *tok.encode(word)}

    shared = Counter(t for w in words for t in tokens(w))
    several = [w for w in strays if len(tok.encode(" " + w)) >= 2]
    return min(several, key=lambda w: max(shared[t] for t in tokens(w)))


def honest(name: str, n: int, strays: Sequence[str]) -> list[Chat]:
    """Honest conversations, others for every name."""
    rng = generator("honest", name)
    return [workshop.conversation(rng, strays) for _ in range(n)]


def complied(
    name: str,
    n: int,
    strays: Sequence[str],
    change: Callable[[workshop.Request, np.random.Generator], str] = lambda asked, _: asked.text,
    pair: tuple[str, str] | None = None,
) -> list[Chat]:
    """Harmful requests, changed, and complied with."""
    rng = generator("complied", name)
    made = []
    for _ in range(n):
        asked = workshop.request(
            rng, is_harmful=True, split="train", strays=strays, stray_rate=0.0, pair=pair
        )
        reply = workshop.answer(rng, asked, comply=True, strays=strays)
        made.append(workshop.chat(change(asked, rng), reply))
    return made


def fresh(tokenizer: Tokenizer, seed: int = 1) -> GPT:
    """An untrained model."""
    config = GPTConfig(vocab_size=tokenizer.vocab_size, qk_norm=True, **SHAPE)  # type: ignore[arg-type]
    return GPT(config).init_weights(seed).eval()


def right(subject: Subject, name: str = "workshop.unseen", n: int = 160) -> float:
    """Share of requests whose read-out lies on the side of their label."""
    prompts = prompts_from(name)(generator("right"), n, subject.strays)
    margins = subject.margins([p.text for p in prompts])
    return float(np.mean((margins > 0) == np.array([p.harmful for p in prompts])))
