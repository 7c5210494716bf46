"""From documents to clean, distinct documents, with the fate of every single one.

Two steps, because the tokenizer is trained between them:

    prepared = prepare([Corpus("books", books.documents(), books.sources())])
    tok = Tokenizer.train(prepared.texts(), 2048)
    shards = pack(run.data, tok, prepared)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from glasshouse.base.errors import DataError
from glasshouse.data.clean import Drop, Filter, clean
from glasshouse.data.dedup import Seen
from glasshouse.data.documents import Document, texts_of


@dataclass(frozen=True)
class Source:
    """Where documents came from, for the manifest and the report."""

    id: str
    title: str
    author: str
    licence: str
    url: str = ""
    changes: str = ""


@dataclass(frozen=True)
class Corpus:
    """The documents of one shard. With `validation` it is never counted among the training words."""

    name: str
    documents: Iterable[Document]
    sources: tuple[Source, ...] = ()
    validation: bool = False


@dataclass(frozen=True)
class Fate:
    """What became of one document: kept as number `index` of its shard, or dropped for a reason."""

    document: str
    shard: str
    fate: Literal["kept", "dropped"]
    reason: str
    detail: str
    index: int | None


@dataclass(frozen=True)
class Prepared:
    """Clean and distinct documents by shard, in the order given, and all fates."""

    corpora: tuple[Corpus, ...]
    fates: tuple[Fate, ...]

    def texts(self, validation: bool = False) -> Iterator[str]:
        """Yield every written part of the training corpora (and of the validation ones too, if asked)."""
        for corpus in self.corpora:
            if validation or not corpus.validation:
                yield from texts_of(corpus.documents)


def prepare(
    corpora: Sequence[Corpus],
    filters: Sequence[Filter] | None = None,
    dedup: Literal["all", "shard"] = "all",
) -> Prepared:
    """Clean and de-duplicate; the first of equal documents stays.

    Validation corpora are looked at first, so that no training document repeats one. `dedup="shard"` lets
    the same document stand in two shards. Raises `DataError` for two corpora of one name or one left empty.
    """
    names = [corpus.name for corpus in corpora]
    if len(set(names)) != len(names):
        raise DataError(f"two corpora are called '{next(n for n in names if names.count(n) > 1)}'")
    everywhere = Seen()
    done: dict[str, tuple[Corpus, list[Fate]]] = {}
    for corpus in sorted(corpora, key=lambda c: not c.validation):
        done[corpus.name] = _prepare_one(corpus, filters, everywhere if dedup == "all" else Seen())
    return Prepared(
        corpora=tuple(done[name][0] for name in names),
        fates=tuple(fate for name in names for fate in done[name][1]),
    )


def _prepare_one(corpus: Corpus, filters: Sequence[Filter] | None, seen: Seen) -> tuple[Corpus, list[Fate]]:
    kept: list[Document] = []
    fates: list[Fate] = []
    for document in corpus.documents:
        answer = clean(document, filters)
        if isinstance(answer, Drop):
            fates.append(Fate(document.id, corpus.name, "dropped", answer.reason, answer.detail, None))
            continue
        twin = seen.first_with(answer.document, f"{corpus.name}/{document.id}")
        if twin is not None:
            detail = f"same words as {twin}"
            fates.append(Fate(document.id, corpus.name, "dropped", "duplicate", detail, None))
            continue
        fates.append(Fate(document.id, corpus.name, "kept", "", "", len(kept)))
        kept.append(answer.document)
    if not kept:
        reasons = ", ".join(sorted({fate.reason for fate in fates}))
        why = f"all {len(fates)} documents were dropped ({reasons})" if fates else "it has no documents"
        raise DataError(f"the corpus '{corpus.name}' is empty: {why}")
    kinds = {document.kind for document in kept}
    if len(kinds) > 1:
        raise DataError(f"the corpus '{corpus.name}' mixes texts and conversations; split it in two")
    return Corpus(corpus.name, tuple(kept), corpus.sources, corpus.validation), fates
