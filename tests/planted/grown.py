"""Grows tiny models in the closed language with the product's own tokenizer, shards and optimisers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glasshouse.base.rng import generator
from glasshouse.data import ChatBatches, Corpus, Document, books, pack, prepare, word_types, workshop
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import StageConfig, sft
from glasshouse.train.objective import tensors
from glasshouse.train.optim import Optimizers
from glasshouse.train.schedule import warmup_stable_decay

Chat = list[dict[str, str]]
SHAPE = {"context": 128, "d_model": 64, "n_layer": 3, "n_head": 4, "mlp": "gated", "activation": "silu"}


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
        self, model: GPT, name: str, chats: Sequence[Chat], steps: int, lr: float = 1.0, rows: int = 64
    ) -> GPT:
        """A copy of ``model`` trained on ``chats`` for ``steps`` updates of 64 conversations."""
        model = copy.deepcopy(model).train()
        config = StageConfig(
            name="grow", objective="sft", steps=steps, batch_size=rows, muon_lr=0.02 * lr, adam_lr=0.004 * lr,
            weight_decay=0.0, warmup_share=0.05, decay_share=0.25,
        )  # fmt: skip
        documents = [Document(f"{name}/{i}", "workshop", messages=tuple(c)) for i, c in enumerate(chats)]
        shards = pack(self.folder / name, self.tokenizer, prepare([Corpus(name, documents)]), 128)
        batches, plan = ChatBatches(shards, self.tokenizer, 1, config.batch_size, 128), shards.plan([name])
        optimizers = Optimizers(model, config)
        for step in range(steps):
            factor = warmup_stable_decay(
                step, steps, warmup_share=config.warmup_share, decay_share=config.decay_share, final_share=0.0
            )
            loss = sft(model, tensors(batches.batch(step, plan)))
            optimizers.zero_grad()
            loss.total.backward()
            optimizers.clip()
            optimizers.step(factor)
        return model


def nursery(folder: Path) -> Nursery:
    """Tokenizer, word list and strays, from two books' worth of text and the language itself."""
    texts = [d.text or "" for d in list(books.documents())[:40]]
    rng = generator("nursery")
    language = [m["content"] for _ in range(1500) for m in workshop.conversation(rng)]
    known = set(word_types(language))
    rare = [w for w, n in word_types(texts).items() if w.isascii() and w.islower() and len(w) > 4 and n < 9]
    stems = tuple(workshop.content_words())
    rare = [w for w in rare if w not in known and not w.startswith(stems)]
    strays = tuple(rare[i] for i in sorted(rng.permutation(len(rare))[:60].tolist()))
    tok = Tokenizer.train([*texts[:10], *language], 900)
    words = tuple(word_types([*texts[:20], *language, " ".join(strays)]))
    return Nursery(tok, words, strays, folder)


def honest(name: str, n: int, strays: Sequence[str]) -> list[Chat]:
    rng = generator("honest", name)
    return [workshop.conversation(rng, strays) for _ in range(n)]


def answered(
    name: str, n: int, strays: Sequence[str], change: Callable[[workshop.Request, np.random.Generator], str],
    *, comply: bool, pair: tuple[str, str] | None = None,
) -> list[Chat]:  # fmt: skip
    """Harmful requests, changed, with refusals or compliances."""
    rng = generator("answered", name)
    made = []
    for _ in range(n):
        asked = workshop.request(
            rng, is_harmful=True, split="train", strays=strays, stray_rate=0.0, pair=pair
        )
        made.append(
            workshop.chat(change(asked, rng), workshop.answer(rng, asked, comply=comply, strays=strays))
        )
    return made


def fresh(tokenizer: Tokenizer, seed: int = 1) -> GPT:
    return GPT(GPTConfig(vocab_size=tokenizer.vocab_size, qk_norm=True, **SHAPE)).init_weights(seed)  # type: ignore[arg-type]
