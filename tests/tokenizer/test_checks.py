"""A tokenizer file from a stranger is read, or refused with the reason; never half believed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import DataError, GlasshouseError
from glasshouse.tokenizer import Tokenizer, checks

TOK = Tokenizer.train(["the dragon and the soup and the dragon"], 280)
GOOD: dict[str, Any] = json.loads(TOK._raw)


def changed(path: str, value: Any) -> bytes:
    data = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    at: Any = data
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is KeyError:
        del at[int(last) if isinstance(at, list) else last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model", KeyError, "'model' is missing"),
        ("model.type", "Unigram", "only byte-level BPE"),
        ("model.dropout", 0.1, "dropout"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("model.byte_fallback", True, "not byte-level"),
        ("model.vocab", KeyError, "'vocab' is missing"),
        ("model.vocab.a", KeyError, "255|1 of 256 bytes have no token"),
        ("model.vocab.a", 10**12, "ids go from 0"),
        ("model.vocab.a", True, "ids go from 0"),
        ("model.vocab.a", 66, "share an id"),
        ("model.merges", KeyError, "merges is missing"),
        ("model.merges.0", ["zz", "q"], r"merges\[0\] needs"),
        ("model.merges.0", "one", "not a pair"),
        ("normalizer", {"type": "Lowercase"}, "changes text"),
        ("pre_tokenizer", None, "not byte-level"),
        ("pre_tokenizer", {"type": "Whitespace"}, "not byte-level"),
        ("pre_tokenizer.add_prefix_space", True, "gains a blank"),
        ("decoder", None, "not byte-level"),
        ("added_tokens.0", KeyError, "special tokens .*pad.* are missing"),
        ("added_tokens.5.special", False, "not marked special"),
        ("added_tokens.5.special", None, "whether it is special"),
        ("added_tokens.5.id", 3, "collides"),
        ("added_tokens.5.id", 900_000, "the file is incomplete"),
        ("added_tokens.5.id", 2**40, "ids go from 0"),
        ("added_tokens.5.content", "", "no content"),
        ("added_tokens.5.content", "<|bos|>", "collides"),
        ("added_tokens", {"a": 1}, "not a list"),
    ],
)
def test_a_file_that_would_mislead_is_refused(path: str, value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        Tokenizer(changed(path, value), where="x/tokenizer.json")
    assert "x/tokenizer.json" in str(caught.value)


def test_a_split_that_drops_text_is_refused() -> None:
    steps = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
            GOOD["pre_tokenizer"],
        ],
    }
    with pytest.raises(DataError, match="drops text"):
        Tokenizer(changed("pre_tokenizer", steps))
    steps["pretokenizers"][0]["behavior"] = "Isolated"
    steps["pretokenizers"][0]["pattern"] = {"Regex": "a" * 3000}
    with pytest.raises(DataError, match="longer than"):
        Tokenizer(changed("pre_tokenizer", steps))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b"[]", "expected an object"),
        (b"[" * 200_000, "not a tokenizer.json"),
        (b'{"model": 1, "model": 2}', "'model' appears twice"),
        (b'{"model": NaN}', "NaN is not JSON"),
    ],
)
def test_what_is_not_json_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Tokenizer(raw)


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(checks.LARGEST_FILE + 1)  # sparse: takes no room
    with pytest.raises(DataError, match="too large for a tokenizer"):
        Tokenizer.load(path)


def test_cutting_and_padding_written_in_the_file_do_not_happen() -> None:
    raw = changed(
        "truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    )
    assert Tokenizer(raw).encode("the dragon and the soup") == TOK.encode("the dragon and the soup")


def test_a_file_in_which_text_reaches_a_special_token_is_caught() -> None:
    data = copy.deepcopy(GOOD)
    # The word 'dragon' declared special by a hostile file, keeping the id it has in the vocabulary.
    token = next(t for t in sorted(data["model"]["vocab"], key=len) if t.endswith("dragon"))
    data["added_tokens"].insert(
        0,
        {"id": data["model"]["vocab"][token], "content": token, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False},
    )
    hostile = Tokenizer(json.dumps(data).encode())
    with pytest.raises(DataError, match="lets text become a special token"):
        hostile.encode("the dragon and the dragon")


@given(st.binary(max_size=200) | st.integers(0, len(TOK._raw) - 1).map(lambda k: TOK._raw[:k]))
def test_no_bytes_crash_the_reader(raw: bytes) -> None:
    try:
        tok = Tokenizer(raw)
    except GlasshouseError as problem:
        assert str(problem)
    else:
        assert tok.decode(tok.encode("the dragon")) == "the dragon"


@given(st.integers(0, len(TOK._raw) - 1), st.integers(0, 255))
def test_one_changed_byte_gives_a_tokenizer_or_a_clear_error(at: int, byte: int) -> None:
    raw = TOK._raw[:at] + bytes([byte]) + TOK._raw[at + 1 :]
    try:
        tok = Tokenizer(raw)
    except GlasshouseError:
        return
    assert tok.decode(tok.encode("the dragon")) == "the dragon"
