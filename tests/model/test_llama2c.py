from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.generate import generate
from glasshouse.model.llama2c import Llama2cTokenizer, load_llama2c

SHARED = Path(os.environ.get("GLASSHOUSE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
STORIES = SHARED / "weights" / "stories260K"

# What stories260K writes greedily in 200 steps: the expected output in karpathy/llama2.c, test_all.py.
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, "
    '"I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she"
)
DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, CONTEXT = 12, 20, 2, 3, 1, 17, 16


def random_file(path: Path, *, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a random model; return its tensors as the file has them."""
    generator = np.random.default_rng(seed)
    kv = KV * DIM // HEADS
    shapes = {
        **{"embed": (VOCAB, DIM), "norm1": (LAYERS, DIM), "q": (LAYERS, DIM, DIM), "k": (LAYERS, kv, DIM)},
        **{"v": (LAYERS, kv, DIM), "o": (LAYERS, DIM, DIM), "norm2": (LAYERS, DIM)},
        **{"gate": (LAYERS, HIDDEN, DIM), "down": (LAYERS, DIM, HIDDEN), "up": (LAYERS, HIDDEN, DIM)},
        **{"norm": (DIM,), "cos": (CONTEXT, DIM // HEADS // 2), "sin": (CONTEXT, DIM // HEADS // 2)},
    }
    if not tied:
        shapes["head"] = (VOCAB, DIM)
    tensors = {k: generator.normal(size=s, scale=0.5).astype("<f4") for k, s in shapes.items()}
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(x.tobytes() for x in tensors.values()))
    return tensors


def numpy_forward(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """An independent forward pass, one position at a time as run.c does it, in float64."""
    w = {k: v.astype(np.float64) for k, v in w.items()}
    K = DIM // HEADS

    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def turn(vector: np.ndarray, position: int) -> np.ndarray:
        out = vector.copy()
        for i in range(0, len(vector), 2):  # adjacent pairs, the frequency starting anew in each head
            angle = position / 10_000.0 ** ((i % K) / K)
            pair = complex(vector[i], vector[i + 1]) * complex(np.cos(angle), np.sin(angle))
            out[i], out[i + 1] = pair.real, pair.imag
        return out

    keys: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    values: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["embed"][token].copy()
        for i in range(LAYERS):
            h = rms(x, w["norm1"][i])
            q = turn(w["q"][i] @ h, position)
            keys[i].append(turn(w["k"][i] @ h, position))
            values[i].append(w["v"][i] @ h)
            z = np.zeros(DIM)
            for head in range(HEADS):
                group = slice((head // (HEADS // KV)) * K, (head // (HEADS // KV)) * K + K)
                mine = slice(head * K, head * K + K)
                scores = np.array([q[mine] @ k[group] for k in keys[i]]) / np.sqrt(K)
                share = np.exp(scores - scores.max())
                share /= share.sum()
                z[mine] = sum(s * v[group] for s, v in zip(share, values[i], strict=True))
            x = x + w["o"][i] @ z
            h = rms(x, w["norm2"][i])
            gate = w["gate"][i] @ h
            x = x + w["down"][i] @ (gate / (1 + np.exp(-gate)) * (w["up"][i] @ h))
        logits.append(w.get("head", w["embed"]) @ rms(x, w["norm"]))
    return np.stack(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_an_independent_numpy_forward_pass(tmp_path, tied):
    tensors = random_file(tmp_path / "m.bin", tied=tied)
    tokens = [1, 5, 16, 0, 5, 5, 9, 2, 11, 3]
    model = load_llama2c(tmp_path / "m.bin")
    assert model.config.tied == tied
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(got - numpy_forward(tensors, tokens)).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_file_cut_short_is_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "m.bin"
    random_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        load_llama2c(path)


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, -(2**31)])
def test_no_header_out_of_range_is_read(tmp_path, field, value):
    path = tmp_path / "m.bin"
    random_file(path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, 4 * field, value)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        load_llama2c(path)


def test_later_versions_and_damaged_numbers_are_named(tmp_path):
    path = tmp_path / "m.bin"
    random_file(path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 28 + 400, float("nan"))
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN"):
        load_llama2c(path)
    struct.pack_into("<I", raw, 0, 0x616B3432)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="--version 0"):
        load_llama2c(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_llama2c(tmp_path / "absent.bin")


def tokenizer_file(path: Path, pieces: list[tuple[bytes, float]]) -> int:
    bytes_ = [f"<0x{b:02X}>".encode() for b in range(256)]
    everything = [
        (b"<unk>", 0.0),
        (b"\n<s>\n", 0.0),
        (b"\n</s>\n", 0.0),
        *((b, 0.0) for b in bytes_),
        *pieces,
    ]
    path.write_bytes(
        struct.pack("<i", 27) + b"".join(struct.pack("<fi", s, len(p)) + p for p, s in everything)
    )
    return len(everything)


PIECES = [(b" ", -9.0), (b"a", -9.0), (b"b", -9.0), (b"c", -9.0), (b"ab", -1.0), (b"bc", -0.5), (b" a", -2.0)]


def test_the_best_scoring_pair_is_merged_first(tmp_path):
    n = tokenizer_file(tmp_path / "t.bin", PIECES)
    tokenizer = Llama2cTokenizer.load(tmp_path / "t.bin", n)
    assert tokenizer.encode("abc") == [1, 259 + 6, 259 + 5]  # " a" and "bc": "bc" beats "ab"
    assert tokenizer.encode("ab", bos=False) == [259, 259 + 4]
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("") == [1]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives_encoding(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "t.bin"
    tokenizer = Llama2cTokenizer.load(path, tokenizer_file(path, PIECES))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_spelt_out_special_token_stays_text(tmp_path):
    tokenizer = Llama2cTokenizer.load(tmp_path / "t.bin", tokenizer_file(tmp_path / "t.bin", PIECES))
    for text in ("\n<s>\n", "<0x41>", "<unk>"):
        ids = tokenizer.encode(text, bos=False)
        assert 1 not in ids and 0 not in ids
        assert tokenizer.decode([1, *ids]) == text


def test_a_wrong_tokenizer_file_is_refused(tmp_path):
    path = tmp_path / "t.bin"
    n = tokenizer_file(path, PIECES)
    whole = path.read_bytes()
    for raw, size in ((whole[:-1], n), (whole, n + 1), (whole, n - 1), (whole[:3], n), (b"", n)):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            Llama2cTokenizer.load(path, size)
    path.write_bytes(whole[:8] + struct.pack("<i", -5) + whole[12:])
    with pytest.raises(CheckpointError, match="damaged at token 0"):
        Llama2cTokenizer.load(path, n)
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        Llama2cTokenizer.load(path, n).decode([n])


@pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"the real model is not here: {STORIES} (or $GLASSHOUSE_SHARED)"
)
def test_stories260k_writes_its_recorded_story():
    model = load_llama2c(STORIES / "stories260K.bin")
    tokenizer = Llama2cTokenizer.load(STORIES / "tok512.bin", model.config.vocab_size)
    made = generate(model, [[1]], 200, stop={1})[0]
    assert tokenizer.decode([1, *made.ids]) == GOLDEN
    # Read back as a prompt, the model goes on as it did.
    start = tokenizer.encode(GOLDEN[:60])
    assert [1, *made.ids][: len(start)] == start
    assert generate(model, [start], 20)[0].ids == made.ids[len(start) - 1 : len(start) + 19]
