"""Small corpora that the data tests share."""

from __future__ import annotations

from pathlib import Path

from glasshouse.data import Corpus, Document, Shards, Source, pack, prepare
from glasshouse.tokenizer import Tokenizer

SOURCE = Source("tales", "Tales", "Nobody", "Public domain")


def text_documents(n: int, seed: int = 0) -> list[Document]:
    words = ["dragon", "soup", "kettle", "moon", "naïve", "tower", "seven"]
    return [
        Document(
            f"t{seed}-{k}",
            "tales",
            text=" ".join(words[(k * j + j + seed) % 7] for j in range(20)) + f" end{k}",
        )
        for k in range(n)
    ]


def chat_documents(n: int, tag: str) -> list[Document]:
    return [
        Document(
            f"{tag}{k}",
            "tales",
            messages=(
                {"role": "user", "content": f"{tag} {k}"},
                {"role": "assistant", "content": f"Café {tag} {k}." + " Yes." * (k % 4)},
            ),
        )
        for k in range(n)
    ]


def packed(folder: Path, context: int | None = None) -> tuple[Shards, Tokenizer]:
    """Two text shards, one validation shard, and three chat shards of 10, 10 and 20 conversations."""
    prepared = prepare(
        [
            Corpus("tales", text_documents(30), (SOURCE,)),
            Corpus("more", text_documents(10, seed=3), (SOURCE,)),
            Corpus("held-out", text_documents(8, seed=5), (SOURCE,), validation=True),
            *(
                Corpus(f"chat-{tag}", chat_documents(n, tag), (SOURCE,))
                for tag, n in (("a", 10), ("b", 10), ("c", 20))
            ),
        ]
    )
    tok = Tokenizer.train(prepared.texts(), 320)
    return pack(folder, tok, prepared, context), tok
