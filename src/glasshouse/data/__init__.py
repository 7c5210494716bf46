"""Turn documents into accountable token batches. Needs numpy and the tokenizer, never torch.

`read_documents` -> `prepare` (clean, distinct) -> `pack` (shards) -> `NextTokenBatches` / `ChatBatches`.
"""

from __future__ import annotations

from glasshouse.data.clean import Drop, Keep, clean, normalise
from glasshouse.data.dedup import fingerprint
from glasshouse.data.documents import Document, read_documents, texts_of
from glasshouse.data.loader import ChatBatches, NextTokenBatches
from glasshouse.data.pack import pack
from glasshouse.data.prepare import Corpus, Fate, Prepared, Source, prepare
from glasshouse.data.shards import Shard, Shards
from glasshouse.data.words import word_types

__all__ = [
    "ChatBatches",
    "Corpus",
    "Document",
    "Drop",
    "Fate",
    "Keep",
    "NextTokenBatches",
    "Prepared",
    "Shard",
    "Shards",
    "Source",
    "clean",
    "fingerprint",
    "normalise",
    "pack",
    "prepare",
    "read_documents",
    "texts_of",
    "word_types",
]
