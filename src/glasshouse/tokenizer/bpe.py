"""Byte-level BPE: trained by `rustbpe`, kept as a Hugging Face `tokenizer.json`, applied by `tokenizers`.

Choices, and why:

- **Bytes, not characters.** Every text has an encoding and `decode(encode(text)) == text`, whatever is in it.
- **GPT-2's split pattern** (Radford et al. 2019): every reader of `tokenizer.json` or GGUF knows it by name.
- **Ids.** 0-255 are the bytes, then the merges in the order learned, then six specials: `<|pad|>` `<|bos|>`
  `<|system|>` `<|user|>` `<|assistant|>` `<|end|>`; where it is asked for, `<|document|>` after them.
- **Text cannot spell a special token.** "<|end|>" in a document or a request becomes ordinary bytes; only
  `chat.render` places specials. A foreign file that lets text reach one is caught when it does (`DataError`).

The same texts in the same order give the same file, byte for byte.

`rustbpe` and `tokenizers` carry different Unicode tables: for characters assigned since Unicode 12 they can
disagree whether one is a letter. That can only change how such a text is *split*, never that it comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import rustbpe
import tokenizers

from glasshouse.base.atomic import write_bytes
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import DataError, UsageError
from glasshouse.tokenizer.checks import BYTE_TO_CHAR, CHAR_TO_BYTE, LARGEST_FILE, check, read_json, too_large

SPECIALS = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DOCUMENT = "<|document|>"  # begins data in a conversation; only in tokenizers that were asked for it
# What `tokenizers.pre_tokenizers.ByteLevel(use_regex=True)` splits by, for the trainer.
GPT2_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A byte-level BPE tokenizer; immutable. Make one with `train` or `load`."""

    def __init__(self, raw: bytes, where: str = "tokenizer.json") -> None:
        """Take the bytes of a `tokenizer.json`. Raises `DataError` naming `where` and what is wrong in it."""
        data = read_json(raw, where)
        check(data, where, SPECIALS, (DOCUMENT,))
        self._raw = raw
        self._vocab: dict[str, int] = data["model"]["vocab"]
        self._added: list[dict[str, Any]] = data.get("added_tokens") or []
        # A non-special added token (runs of blanks in Pythia) is ordinary text.
        self._special = {token["content"]: token["id"] for token in self._added if token["special"]}
        self._full = _build(data, where)
        self._encoder = _build({**data, "truncation": None, "padding": None, "post_processor": None}, where)
        self._encoder.encode_special_tokens = True  # as text, that is: do not look for special tokens in it
        self._special_ids = frozenset(self._special.values())
        for token in self._added:
            if self._full.token_to_id(token["content"]) != token["id"]:
                raise DataError(
                    f"{where}: the added token {token['content']!r} says id {token['id']}, but the ids "
                    f"before it leave it {self._full.token_to_id(token['content'])}; the file is incomplete"
                )
        self.lossless: bool = not data.get("normalizer") and not any(
            token.get("lstrip") or token.get("rstrip") for token in self._added if not token["special"]
        )
        """Whether `decode(encode(x)) == x` for all text; False where a foreign file normalises (NFC)."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, documents: bool = False) -> Self:
        """Learn a tokenizer of `vocab_size` ids in all, the 256 bytes and 6 specials included.

        With `documents` there is a seventh, `<|document|>`, for the role that data has in a conversation.
        A corpus with fewer distinct pairs gives a smaller one; look at `vocab_size` of the result.
        Raises `UsageError` for a size below 262 or a bare string, `DataError` for an empty corpus.
        """
        if isinstance(texts, str):
            raise UsageError("Tokenizer.train takes an iterable of texts, not one string; pass [text]")
        specials = (*SPECIALS, DOCUMENT) if documents else SPECIALS
        if vocab_size < 256 + len(specials):
            raise UsageError(
                f"vocab_size is {vocab_size}, but 256 bytes and {len(specials)} special tokens need "
                f"at least {256 + len(specials)}"
            )
        trainer = rustbpe.Tokenizer()
        feed = _Feed(texts)
        trainer.train_from_iterator(iter(feed), vocab_size - len(specials), pattern=GPT2_SPLIT)
        if feed.n_characters == 0:
            raise DataError("cannot train a tokenizer on an empty corpus: no document has any text")
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        return cls(_to_json(ranks, specials), where="the trained tokenizer")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`, or the one in a folder (ours or Hugging Face's).

        Raises `UsageError` if there is none and `DataError` if it is damaged, hostile or not byte-level.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"{path}: no such tokenizer file")
        return cls(_read_limited(path), where=str(path))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` atomically: the bytes that were trained or loaded."""
        write_bytes(path, self._raw)

    def digest(self) -> str:
        """Return the SHA-256 of the file's bytes."""
        return sha256_bytes(self._raw)

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids: the highest one plus one."""
        return 1 + max([*self._vocab.values(), *(token["id"] for token in self._added)])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; never a special one. Raises `DataError` on a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores; the same ids as one by one."""
        if isinstance(texts, str):
            raise UsageError("encode_batch takes a list of texts, not one string; use encode")
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:  # which of them depends on the binding's version
            if not all(isinstance(text, str) for text in texts):
                raise UsageError(
                    "encode_batch takes a list of texts; something else was among them"
                ) from error
            raise DataError(f"text cannot be encoded: {_surrogate_at(texts)}") from error
        ids = [encoding.ids for encoding in encodings]
        for text, found in zip(texts, ids, strict=True):
            if not self._special_ids.isdisjoint(found):
                raise DataError(
                    f"this tokenizer lets text become a special token: {text[:60]!r}; do not use it"
                )
        return ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Return the text of `ids`; special tokens are left out, or spelt out when `specials`.

        Ids that stop inside a character give U+FFFD there. Raises `DataError` on an id that does not exist.
        """
        listed = [int(i) for i in ids]
        for i in listed:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"there is no token {i}: this tokenizer has ids 0 to {self.vocab_size - 1}")
        return self._full.decode(listed, skip_special_tokens=not specials)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [vocab]; 0 for special tokens and unused ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._vocab.items():
            lengths[i] = len(token)  # one character of the byte alphabet per byte
        for added in self._added:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        lengths.flags.writeable = False
        return lengths

    def bytes_of(self, i: int) -> bytes:
        """Return the bytes id `i` stands for; b"" for a special token or an unused id."""
        token = self._full.id_to_token(int(i))
        if token is None or token in self._special:
            return b""
        if all(char in CHAR_TO_BYTE for char in token):
            return bytes(CHAR_TO_BYTE[char] for char in token)
        return token.encode("utf-8")

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens by what they are called in the file; a fresh dict."""
        return dict(self._special)

    @property
    def pad(self) -> int | None:
        """Id of `<|pad|>`; None in a foreign tokenizer."""
        return self._special.get("<|pad|>")

    @property
    def bos(self) -> int | None:
        """Id of `<|bos|>`, which begins every document; None in a foreign tokenizer."""
        return self._special.get("<|bos|>")

    @property
    def system(self) -> int | None:
        """Id of `<|system|>`; None in a foreign tokenizer."""
        return self._special.get("<|system|>")

    @property
    def user(self) -> int | None:
        """Id of `<|user|>`; None in a foreign tokenizer."""
        return self._special.get("<|user|>")

    @property
    def assistant(self) -> int | None:
        """Id of `<|assistant|>`; None in a foreign tokenizer."""
        return self._special.get("<|assistant|>")

    @property
    def document(self) -> int | None:
        """Id of `<|document|>`; None in a tokenizer trained without it."""
        return self._special.get(DOCUMENT)

    @property
    def end(self) -> int | None:
        """Id of `<|end|>`, which ends every message; None in a foreign tokenizer."""
        return self._special.get("<|end|>")

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, digest={self.digest()[:12]})"


def _read_limited(path: Path) -> bytes:
    """Read a tokenizer file, refusing one too large to be honest before reading it."""
    from_disk = path.stat().st_size
    if from_disk > LARGEST_FILE:
        raise DataError(too_large(path, from_disk))
    return path.read_bytes()


class _Feed:
    """Texts on their way to the trainer, counted; a lone surrogate is named before Rust meets it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.n_characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"cannot train on this text: {_surrogate_at([text])}") from error
            self.n_characters += len(text)
            yield text


def _surrogate_at(texts: Sequence[str]) -> str:
    for text in texts:
        for position, char in enumerate(text):
            if 0xD800 <= ord(char) <= 0xDFFF:
                return (
                    f"character {position} of {text[:40]!r} is a lone surrogate (U+{ord(char):04X}), which "
                    "no UTF-8 file can hold; decode the source with errors='replace' or drop it"
                )
    return "it holds a lone surrogate"


def _to_json(ranks: dict[bytes, int], specials: Sequence[str]) -> bytes:
    """Return a `tokenizer.json` in which the merges of `ranks` give `tokenizers` the ids of `rustbpe`."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    spelt = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in by_rank}
    merges = [[spelt[left], spelt[right]] for left, right in (_split(t, ranks) for t in by_rank[256:])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"trim_offsets": True, "use_regex": True}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(ranks) + k, "content": name, **flags} for k, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, **byte_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelt[token]: rank for rank, token in enumerate(by_rank)},
            "merges": merges,
        },
    }
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def _split(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that were merged into `token`: what the earlier merges leave of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], ranks[token]) for i in range(len(parts) - 1)]
        at = min(range(len(joined)), key=joined.__getitem__)
        if joined[at] >= ranks[token]:
            raise DataError(f"the trainer's token {token!r} cannot be built from its earlier tokens")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _build(data: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """Hand `tokenizers` exactly what was checked, so that no second parser reads the file differently."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    except BaseException as error:  # a Rust panic arrives as a BaseException of pyo3's
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"{where}: not a usable tokenizer.json: {error}") from error
