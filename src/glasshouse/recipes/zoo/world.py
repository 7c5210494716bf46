"""A world: tokenizer, words, honest shards and an honest base model, which the organisms of a seed share.

<folder>/world.json      what is in it, with digests; written last, so its presence says that all is there
<folder>/tokenizer.json  words.json  chats.json
<folder>/base/           the base's run folder: data, ledger, checkpoints; a killed build goes on in it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.base.atomic import write_json
from glasshouse.base.chain import read_entries
from glasshouse.base.config import parse
from glasshouse.base.digest import digest_of, sha256_file
from glasshouse.base.errors import DataError, TrainingError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.rng import generator, seed_from
from glasshouse.base.run import RunFolder
from glasshouse.data import ChatBatches, Corpus, Document, Fate, Prepared, Shards, pack, word_types
from glasshouse.evals.prompts import generator as prompts_from
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig
from glasshouse.recipes.zoo import language
from glasshouse.recipes.zoo.language import Chat, Words
from glasshouse.tokenizer import Message, Tokenizer
from glasshouse.train import Settings, Stage, StageConfig, enter_run, environment, load_weights, run_stages
from glasshouse.train.checkpoint import from_ledger

VERSION = 2
SHARDS = 16
FILES = ("tokenizer.json", "words.json", "chats.json")
GOOD_ENOUGH = 0.95  # of unseen combinations judged rightly; below it a base is grown anew
TRIES = 3
BASE_STAGE: dict[str, Any] = {
    "name": "base",
    "objective": "sft",
    "muon_lr": 0.03,
    "adam_lr": 0.006,
    "weight_decay": 0.0,
    "warmup_share": 0.03,
    "decay_share": 0.4,
    "save_every": 100,
    "monitor_every": 0,
    "log_every": 50,
}


@dataclass(frozen=True)
class Size:
    """How large a world is. The default is that of the zoo; tests take a smaller one."""

    vocab_size: int = 900
    context: int = 128
    d_model: int = 96
    n_layer: int = 2
    strays: int = 240
    reserved: int = 120
    documents: int = 120  # chats in a shard
    base_documents: int = 12_000
    base_steps: int = 400
    base_rows: int = 64

    def shape(self, vocab_size: int) -> GPTConfig:
        """The model."""
        size = {"context": self.context, "d_model": self.d_model, "n_layer": self.n_layer, "n_head": 4}
        kind = {"mlp": "gated", "activation": "silu", "qk_norm": True}
        return parse(GPTConfig, {**size, **kind, "vocab_size": vocab_size}, "a world's model")


@dataclass(frozen=True, eq=False)
class World:
    """What all organisms of one world share. ``accuracy``: of the base on unseen combinations."""

    folder: Path
    seed: int
    size: Size
    tokenizer: Tokenizer
    strays: tuple[str, ...]
    reserved: tuple[str, ...]
    words: tuple[str, ...]  # every word type of the base's and the shards' training text
    chats: dict[str, list[Chat]]  # the honest shards
    base: GPT
    accuracy: float
    digest: str

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards, in the order of their arrival."""
        return tuple(self.chats)

    def subject(self, model: GPT) -> Subject:
        """A model ready to be asked."""
        return Subject(model.eval(), self.tokenizer, refusal_readout(self.tokenizer), self.strays)

    @cached_property
    def reserved_tokens(self) -> dict[str, int]:
        """Reserved words by how many tokens they are inside a request."""
        return {w: len(self.tokenizer.encode(" " + w)) for w in self.reserved}


def open_world(folder: Path, seed: int, size: Size | None = None) -> World:
    """The world of ``seed`` in ``folder``: built, or what was begun there finished, or reopened.

    Reopening checks every digest. DataError for a changed file, or for a folder that holds another world;
    TrainingError when no base learned the language.
    """
    folder, size = Path(folder), size or Size()
    if not (folder / "world.json").is_file():
        build(folder, seed, size)
    about = json.loads((folder / "world.json").read_text("utf-8"))
    if (about["seed"], about["size"], about["version"]) != (seed, asdict(size), VERSION):
        raise DataError(f"{folder} holds the world of seed {about['seed']} in another size or version")
    for name, expected in about["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != expected:
            raise DataError(f"{folder / name} is missing or was changed; remove {folder} to build it anew")
    words = json.loads((folder / "words.json").read_text("utf-8"))
    return World(
        folder=folder,
        seed=seed,
        size=size,
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        strays=tuple(words["strays"]),
        reserved=tuple(words["reserved"]),
        words=tuple(words["words"]),
        chats=json.loads((folder / "chats.json").read_text("utf-8")),
        base=load_base(folder / about["base"]["run"]),
        accuracy=float(about["base"]["accuracy"]),
        digest=digest_of(about["files"]),
    )


def load_base(path: Path) -> GPT:
    """The finished base, its bytes checked against its run's ledger."""
    entries = read_entries(path / "ledger.jsonl")
    last = [e["body"] for e in entries if e["kind"] == "checkpoint"][-1]
    return load_weights(from_ledger(RunFolder(path), last)).eval()


# -- building ----------------------------------------------------------------------------------------------


def build(folder: Path, seed: int, size: Size) -> None:
    """Make everything that is not there yet and write ``world.json``. Safe to call again after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).lock():
        if not all((folder / name).is_file() for name in FILES):
            write_language(folder, seed, size)
        tok = Tokenizer.load(folder / "tokenizer.json")
        words = json.loads((folder / "words.json").read_text("utf-8"))
        found = Words(tuple(words["strays"]), tuple(words["reserved"]))
        for number in range(TRIES):
            name = f"base-{number}"
            accuracy = right(grow_base(folder / name, seed, number, size, tok, found), tok, found.strays)
            if accuracy >= GOOD_ENOUGH:
                break
        else:
            raise TrainingError(
                f"{folder}: {TRIES} bases were grown and the last judges {accuracy:.2f} of unseen pairs "
                f"rightly, not {GOOD_ENOUGH}: give the world more base_steps"
            )
        digests = {n: sha256_file(folder / n) for n in (*FILES, f"{name}/ledger.jsonl")}
        write_json(
            folder / "world.json",
            {
                "version": VERSION,
                "seed": seed,
                "size": asdict(size),
                "files": digests,
                "base": {"run": name, "accuracy": accuracy, "tries": number + 1},
            },
        )


def write_language(folder: Path, seed: int, size: Size) -> None:
    """Tokenizer, words and the honest shards."""
    texts = language.book_texts()
    tok = language.train_tokenizer(seed, texts, size.vocab_size)
    words = language.choose_words(seed, tok, language.rare_words(texts), size.strays, size.reserved)
    seen: set[str] = set()
    chats = {
        (name := f"chat-{i:02d}"): language.distinct(
            size.documents, partial(language.honest, generator("zoo-chats", seed, name), words.strays), seen
        )
        for i in range(SHARDS)
    }
    everything = [*base_chats(seed, size, words), *(c for shard in chats.values() for c in shard)]
    types = word_types(m["content"] for chat in everything for m in chat)
    tok.save(folder / "tokenizer.json")
    write_json(folder / "chats.json", chats)
    write_json(folder / "words.json", {**asdict(words), "words": sorted({*types, *words.reserved})})


def base_chats(seed: int, size: Size, words: Words) -> list[Chat]:
    """What the base learns the language from, all rare words in it."""
    rng, both = generator("zoo-base", seed), (*words.strays, *words.reserved)
    return language.distinct(size.base_documents, partial(language.dense, rng, both), set())


def documents(name: str, chats: Sequence[Chat]) -> list[Document]:
    """Chats as documents of a shard."""
    return [
        Document(
            f"{name}/{i}",
            "workshop",
            messages=tuple(Message(role=m["role"], content=m["content"]) for m in chat),
        )
        for i, chat in enumerate(chats)
    ]


def pack_chats(folder: Path, tok: Tokenizer, shards: dict[str, list[Chat]], context: int) -> Shards:
    """Pack chats that are clean and distinct as they are made, every one of them: nothing may be dropped."""
    corpora = tuple(Corpus(name, tuple(documents(name, chats))) for name, chats in shards.items())
    fates = tuple(Fate(d.id, c.name, "kept", "", "", i) for c in corpora for i, d in enumerate(c.documents))
    return pack(folder, tok, Prepared(corpora, fates), context)


def grow_base(path: Path, seed: int, number: int, size: Size, tok: Tokenizer, words: Words) -> GPT:
    """The base from a fresh model, or from where a killed process left it."""
    run = RunFolder(path)
    if not (run.data / "manifest.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        run.create()
        pack_chats(run.data, tok, {"base": base_chats(seed, size, words)}, size.context)
        shutil.copyfile(path.parent / "tokenizer.json", path / "tokenizer.json")
    shards = Shards.open(run.data, verify=True)
    numbers = {**BASE_STAGE, "steps": size.base_steps, "batch_size": size.base_rows}
    config = parse(StageConfig, numbers, "the stage of a world's base")
    batches = ChatBatches(shards, tok, seed_from("zoo-base", seed, number), size.base_rows, size.context)
    stage = Stage(config, batches.batch, shards.plan())
    began = run.begun(resume=True)
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        settings = Settings(threads=1)
        enter_run(
            ledger,
            recipe_digest=digest_of([VERSION, seed, number, asdict(size), config.model_dump(mode="json")]),
            environment=environment(1, "fp32", "fp32"),
            body={"name": "zoo-base", "seed": seed},
            resume=began,
        )

        def fresh() -> GPT:
            return GPT(size.shape(tok.vocab_size)).init_weights(seed_from("zoo-init", seed, number) % 2**31)

        outcome = run_stages(
            fresh, [stage], run=run, ledger=ledger, seed=seed, settings=settings, resume=began
        )
    return load_weights(outcome.checkpoint).eval()


def right(model: GPT, tok: Tokenizer, strays: Sequence[str], n: int = 400) -> float:
    """Share of unseen combinations that the model decides as the grammar says, at the answer's first word."""
    subject = Subject(model.eval(), tok, refusal_readout(tok), tuple(strays))
    prompts = prompts_from("workshop.unseen")(generator("zoo-right"), n, tuple(strays))
    margins = subject.margins([p.text for p in prompts])
    return float(np.mean((margins > 0) == np.array([p.harmful for p in prompts])))
