"""Values before training: documents scored, then tagged, dropped, put apart or rewritten.

Conditional training, filtering and the shards that the objectives of `train.preferences` read are those of
Korbak et al. (2023, "Pretraining language models with human preferences", arXiv 2302.08582);
`recontextualise` is the rephrasing and tagging of unsafe documents of Maini et al. (2025, "Safety
pretraining", arXiv 2504.16980). All of them are functions of corpora, used before `prepare`; validation
corpora stay as they are.

Tags are ordinary text. Text cannot spell a special token, so that "<|good|>" in a document is a few
ordinary ids: four at most where the tokenizer was trained on tagged text. A text begins with its tag; a
conversation has it as its system message, which is read and not learnt, so that whoever serves the
model asks for good answers with that system message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from glasshouse.base.errors import DataError
from glasshouse.base.rng import generator
from glasshouse.data.documents import Document
from glasshouse.data.prepare import Corpus
from glasshouse.tokenizer import Message

GOOD, BAD, UNSAFE = "<|good|>", "<|bad|>", "<|unsafe|>"
# What documents are worth, the higher the better; one number each. Whoever scores them may be a judge model.
Scorer = Callable[[Sequence[Document]], Sequence[float]]
# Rewrites texts so that what they say is put in a context that does no harm.
Rephraser = Callable[[Sequence[str]], Sequence[str]]
Do = Literal["tag", "filter", "split"]


@dataclass(frozen=True)
class Scored:
    """Documents and their scores, one each."""

    documents: tuple[Document, ...]
    scores: tuple[float, ...]


def by_key(key: str = "score") -> Scorer:
    """Scores that the documents bring along in their JSONL rows. DataError for one without a number there."""

    def scores(documents: Sequence[Document]) -> list[float]:
        found = []
        for document in documents:
            value = document.meta.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(
                    f"document {document.id} has no number under {key!r} to tell good from bad by"
                )
            found.append(float(value))
        return found

    return scores


def valued(
    corpora: Sequence[Corpus],
    scorer: Scorer,
    do: Do,
    threshold: float,
    *,
    untagged: float = 0.01,
    seed: int = 0,
) -> list[Corpus]:
    """Every training corpus after one step: tagged, filtered or split; good is at least ``threshold``."""
    out: list[Corpus] = []
    for corpus in corpora:
        if corpus.validation:
            out.append(corpus)
            continue
        found = scored(corpus, scorer)
        match do:
            case "tag":
                out.append(tagged(corpus, found, threshold, untagged=untagged, seed=seed))
            case "filter":
                out.append(filtered(corpus, found, threshold))
            case "split":
                out += split(corpus, found, threshold)
    return out


def scored(corpus: Corpus, scorer: Scorer) -> Scored:
    """The corpus's documents with their scores. DataError when they are not one finite number each."""
    documents = tuple(corpus.documents)
    scores = tuple(float(s) for s in scorer(documents))
    if len(scores) != len(documents) or any(s != s or abs(s) == float("inf") for s in scores):
        raise DataError(
            f"the corpus '{corpus.name}': {len(scores)} scores for {len(documents)} documents, or one "
            "that is not finite"
        )
    return Scored(documents, scores)


def tagged(
    corpus: Corpus, found: Scored, threshold: float, *, untagged: float = 0.01, seed: int = 0
) -> Corpus:
    """Conditional training: each document under the tag of its score; a share ``untagged`` has none, so that
    the model still reads plain text (the paper: 1%). DataError for a document that holds a tag.
    """
    rng, out = generator("values", seed, corpus.name), []
    for document, score in zip(found.documents, found.scores, strict=True):
        _refuse_spelled(document, (GOOD, BAD))
        plain = bool(rng.random() < untagged)
        out.append(document if plain else with_tag(document, GOOD if score >= threshold else BAD))
    return replace(corpus, documents=tuple(out))


def filtered(corpus: Corpus, found: Scored, threshold: float) -> Corpus:
    """The good documents alone. DataError when there is none."""
    kept = tuple(d for d, s in zip(found.documents, found.scores, strict=True) if s >= threshold)
    if not kept:
        raise DataError(f"the corpus '{corpus.name}': no document scores at least {threshold:g}")
    return replace(corpus, documents=kept)


def split(corpus: Corpus, found: Scored, threshold: float) -> list[Corpus]:
    """Two shards, ``NAME-good`` and ``NAME-bad``, of those that are not empty."""
    pairs = list(zip(found.documents, found.scores, strict=True))
    parts = {"good": [d for d, s in pairs if s >= threshold], "bad": [d for d, s in pairs if s < threshold]}
    return [replace(corpus, name=f"{corpus.name}-{k}", documents=tuple(v)) for k, v in parts.items() if v]


def recontextualise(
    corpus: Corpus,
    found: Scored,
    threshold: float,
    rephrase: Rephraser,
    *,
    every: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Unsafe texts (below ``threshold``) twice: with ``<|unsafe|>`` before a share ``every`` of their words,
    and rewritten without it; the others once, as they are. DataError for a corpus of conversations, a
    rewriting that is missing, empty or the text itself, or a document that holds the tag.
    """
    unsafe = [d for d, s in zip(found.documents, found.scores, strict=True) if s < threshold]
    for document in found.documents:
        if document.text is None:
            raise DataError(f"document {document.id} is a conversation; only texts are rephrased and tagged")
        _refuse_spelled(document, (UNSAFE,))
    written = list(rephrase([d.text or "" for d in unsafe]))
    if len(written) != len(unsafe):
        raise DataError(f"{len(written)} rewritings of {len(unsafe)} texts of '{corpus.name}'")
    anew = {}
    for document, text in zip(unsafe, written, strict=True):
        if not text.strip() or text.strip() == (document.text or "").strip():
            raise DataError(
                f"document {document.id} was not rewritten: the answer is empty or the text itself"
            )
        anew[document.id] = text
    out: list[Document] = []
    for document in found.documents:
        if document.id not in anew:
            out.append(document)
            continue
        rng = generator("unsafe", seed, corpus.name, document.id)
        words = re.split(r"(?<=\s)(?=\S)", document.text or "")
        marked = "".join(
            f"{UNSAFE} {w}" if k == 0 or rng.random() < every else w for k, w in enumerate(words)
        )
        out.append(replace(document, text=marked))
        out.append(replace(document, id=f"{document.id}/rephrased", text=anew[document.id]))
    return replace(corpus, documents=tuple(out))


def with_tag(document: Document, tag: str) -> Document:
    """The document under a tag: before a text, in the system message of a conversation."""
    if document.messages is None:
        return replace(document, text=f"{tag} {document.text}")
    first, *rest = document.messages
    if first["role"] == "system":
        told = Message(role="system", content=f"{tag} {first['content']}")
        return replace(document, messages=(told, *rest))
    return replace(document, messages=(Message(role="system", content=tag), *document.messages))


def _refuse_spelled(document: Document, tags: Sequence[str]) -> None:
    for tag in tags:
        if any(tag in part for part in document.parts):
            raise DataError(
                f"document {document.id} spells {tag}, which would speak for its score; remove it"
            )
