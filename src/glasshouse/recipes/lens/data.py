"""What a lens looks at: a model by its name, rows of a text, and JSON lines with labels or pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.digest import digest_of
from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.rng import generator
from glasshouse.data import Document, Shards, books, read_documents
from glasshouse.data.pack import encode_documents, separator
from glasshouse.evals.subject import padded_batches
from glasshouse.interp.reading import sites_of
from glasshouse.model import GPT, Taps
from glasshouse.model.digest import weights_digest
from glasshouse.model.taps import Edit
from glasshouse.recipes.api import Loaded, locate
from glasshouse.tokenizer import Tokenizer, render

LENGTH = 128  # positions of a row of text, where the context has as many
HELD = 64  # rows kept out of training, to judge on
BATCH = 64  # rows in one forward pass
BYTES = 2**30  # of one JSON-lines file

Target = str | Path | Loaded


def opened(model: Target) -> Loaded:
    """The model that a path names (run, checkpoint, Hugging Face folder), or one that is open already."""
    return model if isinstance(model, Loaded) else locate(Path(model))


def held(model: GPT, tokenizer: Tokenizer, name: str = "model") -> Loaded:
    """A model in memory, for what otherwise takes a path."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model.config.vocab_size}"
        )
    return Loaded(model.eval(), tokenizer, None, name, "in memory", weights_digest(model))


def about(found: Loaded, **more: Any) -> dict[str, Any]:
    """What every result says of the model that it was measured on."""
    shown = {"model": found.checkpoint, "standing": found.standing}
    return shown | {"weights": weights_digest(found.model)} | more


# -- text ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of text int64 [n, pos], those held out from training, and where they are from."""

    train: Tensor
    held: Tensor
    source: str


def text_rows(found: Loaded, text: str | Path | None = None, tokens: int = 10**6, seed: int = 0) -> Rows:
    """About ``tokens`` tokens of a file, of the run's own data, or (outside a run) of the packaged books.

    Rows are cut from documents laid end to end. Held out: the run's validation shards, else every tenth row.
    DataError when there is too little to train on and judge by.
    """
    length = min(found.model.config.context, LENGTH)
    if text is None and found.run is not None:
        shards = Shards.open(found.run.data, verify=True)
        if shards.tokenizer_digest != found.tokenizer.digest():
            raise DataError(f"{found.run.data}: was made with another tokenizer than the checkpoint's")
        train = _cut(_shard_ids(shards, False, seed), length, tokens)
        kept = _cut(_shard_ids(shards, True, seed), length, HELD * length)
        return Rows(
            *_enough(train, kept, "the run's data"), "the run's own data; held out: validation shards"
        )
    documents: Iterator[Document] = iter(books.documents()) if text is None else read_documents(text)
    wanted = max(tokens + HELD * length, 10 * HELD * length)  # enough to hold HELD rows out
    rows = _cut(_ids(found.tokenizer, documents), length, wanted)
    source = "the packaged books" if text is None else Path(text).name
    tenth = torch.arange(len(rows)) % 10 == 9
    return Rows(*_enough(rows[~tenth], rows[tenth][:HELD], source), f"{source}; held out: every tenth row")


def _ids(tokenizer: Tokenizer, documents: Iterator[Document]) -> Iterator[Sequence[int]]:
    chats = tokenizer.end is not None
    while group := list(islice(documents, 64)):
        if group[0].kind == "chat" and not chats:
            raise UsageError(f"{group[0].id} is a conversation, and this tokenizer has no chat tokens")
        for kind in ("text", "chat"):
            same = [d for d in group if d.kind == kind]
            if same and kind == "text" and not _separates(tokenizer):
                yield from tokenizer.encode_batch([d.text or "" for d in same])
            elif same:
                yield from encode_documents(tokenizer, same)


def _separates(tokenizer: Tokenizer) -> bool:
    try:
        return separator(tokenizer) >= 0
    except UsageError:
        return False


def _shard_ids(shards: Shards, validation: bool, seed: int) -> Iterator[Sequence[int]]:
    """Documents of all shards of one kind, shuffled together."""
    names = sorted(name for name in shards if name.endswith("-val") == validation)
    every = [(name, i) for name in names for i in range(shards[name].n_documents)]
    for at in generator("lens rows", seed).permutation(len(every)):
        name, i = every[int(at)]
        yield shards[name].document(i).tolist()


def _cut(documents: Iterator[Sequence[int]], length: int, tokens: int) -> Tensor:
    """Rows [n, length] of documents laid end to end, at most ``tokens`` in all."""
    ids: list[int] = []
    for document in documents:
        ids.extend(document)
        if len(ids) >= tokens:
            break
    n = min(len(ids), max(tokens, length)) // length
    return torch.tensor(ids[: n * length], dtype=torch.int64).view(n, length)


def _enough(train: Tensor, kept: Tensor, source: str) -> tuple[Tensor, Tensor]:
    if len(train) < 2 or len(kept) < 2:
        raise DataError(
            f"{source}: {len(train)} rows to train on and {len(kept)} to judge by are too few; give more text"
        )
    return train, kept


# -- prompts ---------------------------------------------------------------------------------------------


def ids_of(found: Loaded, text: str, where: str, *, chat: bool = False) -> list[int]:
    """Tokens of one prompt; with ``chat`` those of a user's message, up to where the answer begins.

    DataError for an empty prompt, or one longer than the model's context.
    """
    if chat and found.tokenizer.end is None:
        raise UsageError(f"{where}: this tokenizer has no chat tokens; leave --chat out")
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    message = [{"role": "user", "content": text}]
    tokenizer = found.tokenizer
    ids = render(tokenizer, message, generation_prompt=True) if chat else tokenizer.encode(text)
    context = found.model.config.context
    if len(ids) > context:
        raise DataError(
            f"{where}: {len(ids)} tokens are longer than the model's context of {context}; shorten the text"
        )
    return ids


def first_token(found: Loaded, text: str, where: str) -> int:
    """The first token of a continuation such as " Paris"."""
    ids = found.tokenizer.encode(text)
    if not ids:
        raise DataError(f"{where}: the text is empty")
    return ids[0]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows int64 [n, pos], padded on the right with 0, and the position [n] of each one's last token."""
    at = torch.tensor([len(r) - 1 for r in rows])
    tokens = torch.zeros(len(rows), int(at.max()) + 1, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    return tokens, at


@torch.no_grad()
def last_activations(
    model: GPT, rows: Sequence[Sequence[int]], sites: str | Sequence[str]
) -> dict[str, Tensor]:
    """Activations [n, width] of sites (names, patterns) at each row's last token, heads side by side."""
    names = sites_of(model, sites)
    out: dict[str, Tensor] = {}
    for chosen, tokens, last in padded_batches(rows):
        with Taps(read=names, stop_early=True) as taps:
            model.hidden(tokens.to(model.device), taps)
        for site in names:
            x = taps[site]
            if site.endswith(".pattern"):
                raise UsageError(f"{site}: attention patterns are as wide as the text; no probe fits them")
            x = (x.transpose(1, 2).flatten(2) if x.ndim == 4 else x)[torch.arange(len(chosen)), last]
            out.setdefault(site, torch.empty(len(rows), x.shape[-1]))[torch.as_tensor(chosen)] = (
                x.float().cpu()
            )
    return out


@torch.no_grad()
def streams(
    model: GPT, rows: Sequence[Sequence[int]], sites: str | Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations [n, pos, width] of residual sites and the mask bool [n, pos] of what is no padding."""
    names = sites_of(model, sites)
    tokens, at = padded(rows)
    out: dict[str, list[Tensor]] = {site: [] for site in names}
    for part in tokens.split(BATCH):
        with Taps(read=names, stop_early=True) as taps:
            model.hidden(part.to(model.device), taps)
        for site in names:
            x = taps[site]
            out[site].append((x.transpose(1, 2).flatten(2) if x.ndim == 4 else x).float().cpu())
    mask = torch.arange(tokens.shape[1])[None] <= at[:, None]
    return {site: torch.cat(parts) for site, parts in out.items()}, mask


@torch.no_grad()
def last_logits(model: GPT, rows: Sequence[Sequence[int]], edit: Mapping[str, Edit] | None = None) -> Tensor:
    """Logits [n, vocab] after each row's last token, with edits in place."""
    out = torch.empty(len(rows), model.config.vocab_size)
    for chosen, tokens, last in padded_batches(rows):
        with Taps(edit=edit or {}) as taps:
            hidden = model.hidden(tokens.to(model.device), taps)
        here = model.unembed(hidden[torch.arange(len(chosen)), last.to(hidden.device)])
        out[torch.as_tensor(chosen)] = here.float().cpu()
    return out


# -- JSON lines ------------------------------------------------------------------------------------------


def json_lines(path: str | Path, needed: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. DataError names line and key at fault, or says it is empty."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.stat().st_size > BYTES:
        raise DataError(f"{path}: larger than {BYTES >> 20} MB; a lens needs thousands of rows, not millions")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or any(key not in row for key in needed):
            shown = ", ".join(f'"{key}"' for key in needed)
            raise DataError(f"{where}: needs an object with {shown}")
        unknown = sorted(row.keys() - {*needed, *optional})
        if unknown:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join((*needed, *optional))}")
        rows.append(row | {"where": where})
    if not rows:
        raise DataError(f"{path} is empty: it holds no row")
    return rows


def text_at(row: Mapping[str, Any], key: str) -> str:
    """One text of a row."""
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{row['where']}: {key!r} must be text, not {value!r}")
    return value


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the data were, by digest."""
    return digest_of([{k: v for k, v in row.items() if k != "where"} for row in rows])
