"""Write prepared documents as token shards: the whole folder is there, or nothing is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.base.atomic import atomic_dir, disk_errors, sweep_temporaries
from glasshouse.base.crash import crash_point
from glasshouse.base.digest import digest_of, sha256_file
from glasshouse.base.errors import DataError, UsageError
from glasshouse.data.documents import Document
from glasshouse.data.prepare import Corpus, Fate, Prepared
from glasshouse.data.shards import INDEX_DTYPE, MANIFEST, SHARD_NAME, Shards
from glasshouse.data.words import WORD, word_types
from glasshouse.tokenizer import Tokenizer, render

DOCUMENTS_AT_ONCE = 256  # encoded together on all cores; bounds memory, does not change a byte
LARGEST_UINT16_VOCABULARY = 65_536


def pack(folder: str | Path, tok: Tokenizer, prepared: Prepared, context: int | None = None) -> Shards:
    """Encode every document and write `folder`, which must not exist (or be empty); return it opened.

    `context` is the model's, in tokens. A conversation that does not fit is an error, because cutting it
    would teach half an answer; a text of any length fits, since windows are drawn from it. Equal documents
    and tokenizer give equal bytes. Raises `DataError` for such a conversation, for a text corpus shorter
    than the context, or for a shard name that is not a plain file name.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.parent.is_dir():
        sweep_temporaries(folder.parent)
    with disk_errors(folder), atomic_dir(folder) as tmp:
        rows = [_write_shard(tmp, tok, corpus, prepared.fates, context) for corpus in prepared.corpora]
        crash_point("data-shards")
        _write_lines(tmp / "fates.jsonl", (asdict(fate) for fate in prepared.fates))
        words = {"pattern": WORD.pattern, "words": list(word_types(prepared.texts()).items())}
        (tmp / "words.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", "utf-8")
        manifest = {
            "version": 1,
            "tokenizer": tok.digest(),
            "vocab_size": tok.vocab_size,
            "shards": rows,
            "sources": _sources(prepared.corpora),
            "files": {name: sha256_file(tmp / name) for name in ("fates.jsonl", "words.json")},
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        (tmp / MANIFEST).write_text(text + "\n", "utf-8")
        crash_point("data-manifest")
    return Shards.open(folder)


def encode_documents(tok: Tokenizer, documents: Sequence[Document]) -> Iterator[list[int]]:
    """Yield the ids of each document: a conversation rendered, a text after its separator."""
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        group = documents[start : start + DOCUMENTS_AT_ONCE]
        if group[0].kind == "chat":
            yield from (render(tok, document.messages or ()) for document in group)
        else:
            first = separator(tok)
            for ids in tok.encode_batch([document.text or "" for document in group]):
                yield [first, *ids]


def separator(tok: Tokenizer) -> int:
    """Return the id that begins every text: `<|bos|>`, or `<|endoftext|>` in a foreign tokenizer."""
    found = tok.bos if tok.bos is not None else tok.specials.get("<|endoftext|>")
    if found is None:
        raise UsageError("this tokenizer has neither <|bos|> nor <|endoftext|> to tell documents apart")
    return found


def _write_shard(
    tmp: Path, tok: Tokenizer, corpus: Corpus, fates: Sequence[Fate], context: int | None
) -> dict[str, Any]:
    if not SHARD_NAME.fullmatch(corpus.name):
        raise DataError(f"the corpus name {corpus.name!r} cannot name a file; use letters, digits, - _ and .")
    documents = list(corpus.documents)
    if not documents:
        raise DataError(f"the corpus '{corpus.name}' is empty")
    kind = documents[0].kind
    dtype = np.dtype("<u2" if tok.vocab_size <= LARGEST_UINT16_VOCABULARY else "<u4")
    offsets = [0]
    with open(tmp / f"{corpus.name}.bin", "wb") as file:
        for document, ids in zip(documents, encode_documents(tok, documents), strict=True):
            if kind == "chat" and context is not None and len(ids) - 1 > context:
                raise DataError(
                    f"the conversation {document.id} of '{corpus.name}' has {len(ids)} tokens and the "
                    f"context is {context}: shorten it or raise the context (it is never cut silently)"
                )
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
    if kind == "text" and context is not None and offsets[-1] < context + 1:
        raise DataError(
            f"the corpus '{corpus.name}' has {offsets[-1]} tokens, fewer than one window of {context + 1} "
            f"(context {context} and the next token): add text or lower the context"
        )
    (tmp / f"{corpus.name}.idx").write_bytes(np.asarray(offsets, dtype=INDEX_DTYPE).tobytes())
    files = {name: sha256_file(tmp / name) for name in (f"{corpus.name}.bin", f"{corpus.name}.idx")}
    reasons = Counter(fate.reason for fate in fates if fate.shard == corpus.name and fate.fate == "dropped")
    return {
        "name": corpus.name,
        "kind": kind,
        "dtype": dtype.name,
        "n_documents": len(documents),
        "n_tokens": offsets[-1],
        "n_bytes": sum(len(part.encode("utf-8")) for document in documents for part in document.parts),
        "validation": corpus.validation,
        "dropped": dict(sorted(reasons.items())),
        "sources": [source.id for source in corpus.sources],
        "files": files,
        "digest": digest_of(files),
    }


def _sources(corpora: Sequence[Corpus]) -> list[dict[str, str]]:
    """Every source once, by id. Raises `DataError` if one id stands for two different sources."""
    found: dict[str, dict[str, str]] = {}
    for source in (source for corpus in corpora for source in corpus.sources):
        row = asdict(source)
        if found.setdefault(source.id, row) != row:
            raise DataError(f"two different sources are called '{source.id}'")
    return [found[name] for name in sorted(found)]


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
