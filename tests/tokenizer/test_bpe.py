"""Facts about the tokenizer: lossless, equal to its trainer, deaf to text that spells special tokens."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import rustbpe
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import DataError, UsageError
from glasshouse.tokenizer import SPECIALS, Tokenizer
from glasshouse.tokenizer.bpe import GPT2_SPLIT

CORPUS = [
    "The dragon's soup was cold, and the dragon said: 'I'll not eat it!'\n\n" * 20,
    "In 1999 there were 12345 dragons;  two   spaces,\ttabs and\r\nodd line ends.\n" * 20,
    "Ça va? Größe, naïve, 東京タワー 東京, привет мир, مرحبا, 😀😀 👩‍👩‍👧 e\u0301\u00a0\u3000x\u2009y" * 20,
]
SIZE = 380
TOK = Tokenizer.train(CORPUS, SIZE)
# Any text that UTF-8 can hold, with more blanks, digits and look-alikes of special tokens than by chance.
TEXT = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.text(" \t\r\n\u00a0\u2009\u3000\u200b'0123456789", max_size=8),
        st.sampled_from([*SPECIALS, "<|", "|>", "'ll", "'S", "東京", "dragon", "😀", "<|endoftext|>"]),
    ),
    max_size=8,
).map("".join)


def trained_by_rustbpe() -> rustbpe.Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(CORPUS), SIZE - len(SPECIALS), pattern=GPT2_SPLIT)
    return trainer


RUST = trained_by_rustbpe()


@given(TEXT)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOK.decode(TOK.encode(text)) == text


# The two libraries carry different Unicode tables (12 and 16), so a letter or digit assigned between them may
# be split differently; the claim of equal ids is made for every other character.
@given(TEXT.filter(lambda text: all(_classed_alike(char) for char in text)))
def test_ids_equal_those_of_the_trainer(text: str) -> None:
    assert TOK.encode(text) == RUST.encode(text)


def _classed_alike(char: str) -> bool:
    known_of_old = unicodedata.ucd_3_2_0.category(char) != "Cn"
    return known_of_old or unicodedata.category(char)[0] in "SPMZ"


@given(TEXT)
def test_text_never_becomes_a_special_token(text: str) -> None:
    assert not set(TOK.specials.values()) & set(TOK.encode(text))


@given(st.lists(TEXT, max_size=4))
def test_a_batch_is_encoded_as_its_members(texts: list[str]) -> None:
    assert TOK.encode_batch(texts) == [TOK.encode(text) for text in texts]


@given(TEXT)
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    ids = TOK.encode(text)
    assert int(TOK.token_bytes[ids].sum()) == len(text.encode("utf-8"))
    assert b"".join(TOK.bytes_of(i) for i in ids) == text.encode("utf-8")


def test_specials_follow_the_vocabulary_and_stand_for_no_bytes() -> None:
    ids = [TOK.pad, TOK.bos, TOK.system, TOK.user, TOK.assistant, TOK.end]
    assert ids == list(range(TOK.vocab_size - 6, TOK.vocab_size)) == list(TOK.specials.values())
    assert TOK.vocab_size == SIZE
    assert not TOK.token_bytes[ids].any() and (TOK.token_bytes[: ids[0]] > 0).all()
    assert TOK.bytes_of(ids[0]) == b""


def test_specials_are_spelt_out_only_when_asked_for() -> None:
    ids = [TOK.bos, *TOK.encode("soup"), TOK.end]
    assert TOK.decode(ids) == "soup"
    assert TOK.decode(ids, specials=True) == "<|bos|>soup<|end|>"


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path) -> None:
    TOK.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert (
            again.digest()
            == TOK.digest()
            == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        )
        assert again.encode("The dragon's 東京") == TOK.encode("The dragon's 東京")
        assert np.array_equal(again.token_bytes, TOK.token_bytes)


def test_training_again_in_another_process_gives_the_same_bytes() -> None:
    code = (
        "from glasshouse.tokenizer import Tokenizer\n"
        "text = ''.join(chr(97 + i * i % 17) + ' ' * (i % 3) for i in range(5000))\n"
        "t = Tokenizer.train([text, text[::-1]], 500); print(t.digest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in "12"
    ]
    assert runs[0] == runs[1] != ""


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["aa"], 5000).vocab_size == 256 + 1 + 6


def test_empty_and_single_characters_encode() -> None:
    assert TOK.encode("") == []
    assert TOK.decode([]) == ""
    assert TOK.decode(TOK.encode("\x00")) == "\x00"


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="empty corpus"):
        Tokenizer.train(texts, 300)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="at least 262"):
        Tokenizer.train(["a"], 261)
    with pytest.raises(UsageError, match="not one string"):
        Tokenizer.train("text", 300)
    with pytest.raises(UsageError, match="not one string"):
        TOK.encode_batch("text")
    with pytest.raises(UsageError, match="no such tokenizer file"):
        Tokenizer.load("/nowhere/tokenizer.json")
    with pytest.raises(DataError, match="no token 380"):
        TOK.decode([380])
    with pytest.raises(DataError, match="no token -1"):
        TOK.decode([-1])


def test_a_lone_surrogate_is_named_not_mangled() -> None:
    with pytest.raises(DataError, match=r"character 2 .* lone surrogate \(U\+D800\)"):
        TOK.encode("ab\ud800c")
    with pytest.raises(DataError, match="lone surrogate"):
        Tokenizer.train(["ab\ud800c"], 300)


def test_transformers_reads_the_file_and_gives_the_same_ids(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    TOK.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "The dragon's soup, 12345 東京 — done.\n\n  Yes"
    assert theirs(text)["input_ids"] == TOK.encode(text)
