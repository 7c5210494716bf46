"""The books as token shards, made once and kept: what the scaling sweeps and the miniseries train on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from glasshouse.base.batch import Batch
from glasshouse.base.plan import DataPlan
from glasshouse.data import Corpus, NextTokenBatches, Shards, Source, pack, prepare, read_documents
from glasshouse.tokenizer import Tokenizer

VOCABULARY = 2048
HELD_OUT = 20  # one book in so many validates: 5 of 112
CONTEXT = 128
SOURCES = (Source("books", "112 books", "see SOURCE.txt beside them", "public domain in the USA"),)


def books_parser(description: str | None, raw: str) -> argparse.ArgumentParser:
    """A command line that says where the books are and where finished runs are kept (``raw``, by default)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with books/*.jsonl.gz")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/books"))
    parser.add_argument("--raw", type=Path, default=Path(raw))
    return parser


class Books:
    """Batches of the training books, and fixed validation batches of the held-out ones."""

    def __init__(self, data: Path, cache: Path):
        """``data``/books/*.jsonl.gz; ``cache`` keeps tokenizer and shards, two minutes to make."""
        if not (cache / "tokenizer.json").is_file():
            files = sorted((data / "books").glob("*.jsonl.gz"))
            if not files:
                raise SystemExit(f"{data / 'books'} holds no *.jsonl.gz: name the data folder with --data")
            documents = [d for file in files for d in read_documents(file)]
            held = documents[HELD_OUT - 1 :: HELD_OUT]
            train = [d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1]
            prepared = prepare(
                [
                    Corpus("books", train, SOURCES),
                    Corpus("books-val", held, SOURCES, validation=True),
                ]
            )
            tok = Tokenizer.train(prepared.texts(), VOCABULARY)
            cache.mkdir(parents=True, exist_ok=True)
            pack(cache / "shards", tok, prepared)
            tok.save(cache / "tokenizer.json")
        self.tok, self.shards = Tokenizer.load(cache / "tokenizer.json"), Shards.open(cache / "shards")
        self.plan = self.shards.plan(["books"])

    def batches(self, seed: int, rows: int, context: int = CONTEXT) -> Callable[[int, DataPlan], Batch]:
        """The training batches, a pure function of the step."""
        return NextTokenBatches(self.shards, self.tok, seed, rows, context).batch

    def held_out(self, n_batches: int = 40, context: int = CONTEXT) -> list[Batch]:
        """The same windows of the held-out books every time: 40 x 32 x 128 tokens."""
        return NextTokenBatches(self.shards, self.tok, 0, 32, context).validation(["books-val"], n_batches)
