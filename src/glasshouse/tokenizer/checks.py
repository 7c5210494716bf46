"""What a `tokenizer.json` must be before anything is done with it: readable, byte-level, consistent, bounded.

A tokenizer comes from strangers. It can cut texts short, drop blanks, name an id in the billions, or give one
id to two tokens; each is refused here with the reason, before the Rust library sees the file.
"""

from __future__ import annotations

import json
from typing import Any

from glasshouse.base.errors import DataError

LARGEST_FILE = 50_000_000  # bytes; Qwen3's, with 151,936 ids, has 11 MB
LARGEST_ID = 1_000_000
LONGEST_PATTERN = 2_000  # characters; GPT-4o's has 600
ONLY_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits"}  # the ones that can only cut, not change


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def read_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the file. Raises `DataError` if it is too large, not UTF-8, not JSON, or names a key twice."""
    if len(raw) > LARGEST_FILE:
        raise DataError(too_large(where, len(raw)))
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError as error:
        raise DataError(f"{where}: not a tokenizer.json: nested too deeply") from error
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{where}: not a tokenizer.json: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: not a tokenizer.json: expected an object, got {type(data).__name__}")
    return data


def too_large(where: object, size: int) -> str:
    """Say that a file of `size` bytes is too large."""
    return f"{where}: {size / 1e6:.0f} MB is too large for a tokenizer (limit {LARGEST_FILE / 1e6:.0f} MB)"


def check(
    data: dict[str, Any], where: str, specials: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raise `DataError` naming `where` unless `data` is a byte-level BPE tokenizer.

    `specials` must be there all, each marked special, or not at all (a foreign tokenizer). Those of
    `optional` must be marked special where they are there.
    """
    vocab = _check_model(_table(data, "model", where), where)
    _check_pipeline(data, where)
    _check_added(data.get("added_tokens") or [], vocab, where, specials, optional)


def _check_model(model: dict[str, Any], where: str) -> dict[str, int]:
    if model.get("type", "BPE") != "BPE":
        raise DataError(f"{where}: model.type is {model.get('type')!r}; only byte-level BPE can be read")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"{where}: model.{key} is {model[key]!r}, with which text does not come back")
    if model.get("byte_fallback"):
        raise DataError(f"{where}: not byte-level (model.byte_fallback, as SentencePiece has it)")
    vocab = _table(model, "vocab", where)
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i <= LARGEST_ID:
            raise DataError(f"{where}: the token {token!r} has id {i!r}; ids go from 0 to {LARGEST_ID}")
    if len(set(vocab.values())) != len(vocab):
        raise DataError(f"{where}: two tokens share an id")
    missing = [byte for byte, char in BYTE_TO_CHAR.items() if char not in vocab]
    if missing:
        raise DataError(
            f"{where}: not byte-level: {len(missing)} of 256 bytes have no token (first: 0x{missing[0]:02x})"
        )
    _check_merges(model.get("merges"), vocab, where)
    return vocab


def _check_merges(merges: Any, vocab: dict[str, int], where: str) -> None:
    if not isinstance(merges, list):
        raise DataError(f"{where}: model.merges is missing or not a list")
    for line, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
            raise DataError(f"{where}: model.merges[{line}] is {merge!r}, not a pair of tokens")
        for token in (*parts, parts[0] + parts[1]):
            if token not in vocab:
                raise DataError(
                    f"{where}: model.merges[{line}] needs {token!r}, which is not in the vocabulary"
                )


def _check_pipeline(data: dict[str, Any], where: str) -> None:
    normalizer = data.get("normalizer")
    if normalizer and not (isinstance(normalizer, dict) and normalizer.get("type") == "NFC"):
        raise DataError(f"{where}: the normalizer {_type(normalizer)} changes text; use none or NFC")
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if _type(step) == "ByteLevel"]
    decoders = [_type(step) for step in _steps(data.get("decoder"), "decoders")]
    if len(byte_level) != 1 or "ByteLevel" not in decoders:
        raise DataError(f"{where}: not byte-level: it needs the ByteLevel pre-tokenizer and decoder")
    if byte_level[0].get("add_prefix_space") is not False:
        raise DataError(f"{where}: pre_tokenizer.add_prefix_space must be false, or text gains a blank")
    for step in steps:
        if _type(step) not in ONLY_PRE_TOKENIZERS:
            raise DataError(
                f"{where}: the pre-tokenizer {_type(step)} is none of {sorted(ONLY_PRE_TOKENIZERS)}"
            )
        if _type(step) == "Split" and step.get("behavior") == "Removed":
            raise DataError(f"{where}: a Split pre-tokenizer with behavior 'Removed' drops text")
        if len(json.dumps(step.get("pattern"))) > LONGEST_PATTERN:
            raise DataError(f"{where}: a split pattern is longer than {LONGEST_PATTERN} characters")


def _check_added(
    added: Any, vocab: dict[str, int], where: str, specials: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    if not isinstance(added, list):
        raise DataError(f"{where}: added_tokens is not a list")
    by_id = {i: token for token, i in vocab.items()}
    seen: dict[str, bool] = {}
    for line, token in enumerate(added):
        name = f"{where}: added_tokens[{line}]"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise DataError(f"{name} has no content")
        content, i = token["content"], token.get("id")
        if type(token.get("special")) is not bool:
            raise DataError(f"{name} ({content!r}) does not say whether it is special")
        if type(i) is not int or not 0 <= i <= LARGEST_ID:
            raise DataError(f"{name} ({content!r}) has id {i!r}; ids go from 0 to {LARGEST_ID}")
        if content in seen or by_id.setdefault(i, content) != content or vocab.get(content, i) != i:
            raise DataError(f"{name} ({content!r}) collides with another token over the id {i}")
        seen[content] = token["special"]
    missing = [name for name in specials if name not in seen]
    if missing and len(missing) < len(specials):
        raise DataError(f"{where}: the special tokens {missing} are missing; chat needs all of them")
    for name in (*specials, *optional):
        if not missing and not seen.get(name, True):
            raise DataError(f"{where}: {name} is not marked special, so text could spell it")


def _table(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a tokenizer.json: '{key}' is missing or not an object")
    return value


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or decoder, a Sequence opened (they nest)."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    return [step for p in inner for step in _steps(p, key)] if isinstance(inner, list) else []


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else str(part)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} appears twice")
        table[key] = value
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
