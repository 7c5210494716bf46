"""What a from-scratch recipe with `[align]` trains on before its phases: the closed language, and books."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from glasshouse.align.constitution import Constitution
from glasshouse.base.atomic import write_json
from glasshouse.base.errors import RecipeError
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.data import ChatBatches, Corpus, Document, pack, prepare, situations
from glasshouse.data.workshop import Rng
from glasshouse.recipes import corpus
from glasshouse.recipes.align import language
from glasshouse.recipes.schema import Recipe
from glasshouse.tokenizer import Message, Tokenizer

POOL = 12  # batches whose conversations are sorted by length together
SENTENCES = 12  # true ones in a document of the mid-training shard
FACTS = "facts"  # its name: what spoils what, as text


def build(recipe: Recipe, constitution: Constitution, run: RunFolder, folder: Path) -> corpus.Material:
    """Tokenizer, shards and word lists of a new run: text, `FACTS`, ``chat-NN`` and ``chat-val``.

    RecipeError without `[data.workshop]`: only the closed language has conversations that teach a helper to
    criticise and compare.
    """
    made = recipe.data.workshop
    if made is None:
        raise RecipeError(
            "[align] without a base grows a helper of the closed language: add [data.workshop], or name a "
            "model in [align] base"
        )
    if recipe.data.plant is not None or recipe.data.chat or recipe.data.values is not None:
        raise RecipeError("[align]: [data] plant, chat and values have no place before these phases yet")
    text = corpus.text_corpora(recipe, folder)
    strays = corpus.choose_strays(recipe, text)
    one = partial(language.conversation, constitution=constitution, strays=strays)
    chats = [
        _chats(f"chat-{i:02d}", recipe.seed, made.documents, one, validation=False)
        for i in range(made.shards)
    ]
    chats.append(_chats("chat-val", recipe.seed, made.validation, one, validation=True))
    facts = _facts(recipe.seed, made.shards * made.documents // SENTENCES)
    known = [d.text or "" for c in text if not c.validation for d in c.documents]
    known += [m["content"] for c in chats[:2] for d in c.documents for m in d.messages or ()]
    tok = Tokenizer.train(known, recipe.tokenizer.vocab_size, recipe.tokenizer.documents)
    shards = pack(run.data, tok, prepare([*text, facts, *chats]), int(recipe.model["context"]))
    tok.save(run.path / "tokenizer.json")
    write_json(run.path / "strays.json", list(strays))
    return corpus.Material(tok, shards, strays)


def _chats(name: str, seed: int, n: int, make: partial[language.Chat], *, validation: bool) -> Corpus:
    rng = generator("align-chat", seed, name)
    documents = [
        Document(
            f"{name}/{i}",
            corpus.WORKSHOP_SOURCE.id,
            messages=tuple(Message(role=m["role"], content=m["content"]) for m in make(rng)),
        )
        for i in range(n)
    ]
    return Corpus(name, documents, (corpus.WORKSHOP_SOURCE,), validation=validation)


def _facts(seed: int, n: int) -> Corpus:
    rng = generator("align-facts", seed)
    documents = [
        Document(f"{FACTS}/{i}", corpus.WORKSHOP_SOURCE.id, text=" ".join(_sentences(rng))) for i in range(n)
    ]
    return Corpus(FACTS, documents, (corpus.WORKSHOP_SOURCE,))


def _sentences(rng: Rng) -> list[str]:
    return [situations.statement(rng, true=True, split="train").text for _ in range(SENTENCES)]


class HelperBatches(ChatBatches):
    """Conversations in which an answer that is criticised afterwards is no example to follow: of three turns
    of the assistant's (answer, critique, revision) the first is read and not learnt. Batches are of
    conversations of like length, which halves what is spent on padding; every one still comes once an epoch.
    """

    def _deal(
        self, from_step: int, names: tuple[str, ...], weights: tuple[float, ...], epoch: int
    ) -> np.ndarray:
        rows = super()._deal(from_step, names, weights, epoch)
        lengths = np.array([self.shards[names[which]].lengths[at] for which, at in rows.tolist()])
        rng = generator("align-lengths", self.seed, from_step, epoch)
        size, dealt = self.batch_size, []
        for start in range(0, len(rows), POOL * size):
            order = start + np.argsort(lengths[start : start + POOL * size], kind="stable")
            cut = [order[k : k + size] for k in range(0, len(order), size)]
            whole = [c for c in cut if len(c) == size]
            dealt += [whole[int(k)] for k in rng.permutation(len(whole))] + cut[len(whole) :]
        return rows[np.concatenate(dealt)]

    def _mark(self, name: str) -> np.ndarray:
        mask = super()._mark(name).copy()
        shard = self.shards[name]
        for i in range(shard.n_documents):
            start = int(shard.offsets[i])
            of_document = mask[start : start + int(shard.lengths[i])]
            edges = np.flatnonzero(np.diff(of_document, prepend=0, append=0))
            if len(edges) == 6:
                of_document[edges[0] : edges[1]] = 0
        return mask
