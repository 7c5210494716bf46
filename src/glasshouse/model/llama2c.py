"""Convert llama2.c's legacy ("version 0") model and tokenizer files.

Model file, little endian: 7 int32 ``dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len``
(vocab_size negative: the classifier is not tied), then fp32 tensors, each grouped over the layers.
There is no magic number, so the file's size must be exactly what the header implies.
Source: karpathy/llama2.c, run.c and export.py (MIT).

The file's rotary pairs are adjacent (x[2i], x[2i+1]); ours, like Hugging Face's, are half a head apart.
Permuting the rows of q and k within each head changes one into the other and leaves every score as it was.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.gpt import GPT, GPTConfig

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432  # "ak42": the later versions, which have a header of their own
LIMITS = (65_536, 2**20, 1_024, 1_024, 1_024, 2**20, 2**20)
NAMES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
BOS, EOS, BYTES = 1, 2, 3  # token ids; byte b is token BYTES + b
MAX_PIECE = 4_096  # bytes; a longer piece is a damaged file


def load_llama2c(path: str | Path) -> GPT:
    """Read a version 0 ``.bin`` as a GPT in fp32. Raises CheckpointError for anything but a whole one."""
    path = Path(path)
    raw = _read(path)
    config = _config(path, raw)
    flat = np.frombuffer(raw, dtype="<f4", offset=HEADER.size)
    if not np.isfinite(flat).all():
        raise CheckpointError(f"{path} holds NaN or infinite weights; the file is damaged")
    at = 0
    weights: dict[str, Tensor] = {}
    for name, shape in _layout(config):
        n = math.prod(shape)
        # A copy: parameters are trained in place, and the bytes belong to the file.
        weights[name] = torch.from_numpy(flat[at : at + n].astype(np.float32, copy=True)).reshape(shape)
        at += n
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(_ours(config, weights, name))
    return model.eval()


def _ours(config: GPTConfig, weights: dict[str, Tensor], name: str) -> Tensor:
    """Our parameter ``name`` from the file's tensors, which stack the layers."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return weights[name]
    x = weights[".".join(parts[2:])][int(parts[1])]
    if parts[3] in ("q", "k"):
        K = config.head_width
        x = x.reshape(-1, K // 2, 2, config.d_model).transpose(1, 2).reshape(x.shape)
    return x


def _layout(config: GPTConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The file's tensors in order, under our names (without the layer), with their shapes."""
    L, D, F, V = config.n_layer, config.d_model, config.mlp_width, config.vocab_size
    kv, half = config.kv_heads * config.head_width, config.head_width // 2
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("embed.weight", (V, D)),
        ("norm1.weight", (L, D)),
        ("attn.q.weight", (L, D, D)),
        ("attn.k.weight", (L, kv, D)),
        ("attn.v.weight", (L, kv, D)),
        ("attn.o.weight", (L, D, D)),
        ("norm2.weight", (L, D)),
        ("mlp.gate.weight", (L, F, D)),
        ("mlp.down.weight", (L, D, F)),
        ("mlp.up.weight", (L, F, D)),
        ("norm.weight", (D,)),
        ("(unused cosines)", (config.context, half)),
        ("(unused sines)", (config.context, half)),
    ]
    return layout if config.tied else [*layout, ("head.weight", (V, D))]


def _config(path: Path, raw: bytes) -> GPTConfig:
    if len(raw) < HEADER.size:
        raise CheckpointError(f"{path} is too short ({len(raw)} bytes) for a llama2.c header")
    fields = HEADER.unpack_from(raw)
    if fields[0] == MAGIC:
        raise CheckpointError(
            f"{path} is a later llama2.c version; only the legacy one is read: export with --version 0"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = fields
    for name, value, limit in zip(NAMES, (*fields[:5], abs(vocab), seq_len), LIMITS, strict=True):
        if not 1 <= value <= limit:
            raise CheckpointError(f"{path} is not a llama2.c model: its header says {name} = {value}")
    if dim % heads or heads % kv_heads or dim // heads % 2 or abs(vocab) < 2:
        raise CheckpointError(
            f"{path} is not a llama2.c model: dim {dim}, {heads} heads and {kv_heads} key/value heads "
            "do not fit each other"
        )
    config = GPTConfig(
        vocab_size=abs(vocab),
        context=seq_len,
        d_model=dim,
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv_heads,
        d_mlp=hidden,
        norm="rms",
        norm_eps=1e-5,
        position="rotary",
        rope_theta=10_000.0,
        mlp="gated",
        activation="silu",
        tied=vocab > 0,
    )
    needed = HEADER.size + 4 * sum(math.prod(shape) for _, shape in _layout(config))
    if len(raw) != needed:
        raise CheckpointError(
            f"{path} is truncated or altered: its header needs {needed} bytes, not {len(raw)}"
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error


class Llama2cTokenizer:
    """llama2.c's tokenizer file: SentencePiece BPE pieces with scores.

    int32 longest piece, then for each token: float32 score, int32 length, bytes. Ids: 0 unknown, 1 BOS,
    2 EOS, 3..258 the bytes 0..255, then pieces.
    """

    def __init__(self, pieces: list[bytes], scores: list[float]):
        self.pieces, self.scores = pieces, scores
        self._ids: dict[bytes, int] = {}
        for i, piece in enumerate(pieces):
            if i >= BYTES + 256:  # what comes before are names of tokens and not text
                self._ids.setdefault(piece, i)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> Llama2cTokenizer:
        """Read the file, which does not say how many tokens it holds. Raises CheckpointError."""
        path = Path(path)
        raw, at = _read(path), 4
        pieces: list[bytes] = []
        scores: list[float] = []
        for i in range(vocab_size):
            if at + 8 > len(raw):
                raise CheckpointError(f"{path} is truncated: it ends at token {i} of {vocab_size}")
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8
            if not 0 <= length <= MAX_PIECE or at + length > len(raw) or not math.isfinite(score):
                raise CheckpointError(f"{path} is damaged at token {i}: length {length}, score {score}")
            pieces.append(raw[at : at + length])
            scores.append(score)
            at += length
        if at != len(raw):
            raise CheckpointError(f"{path} holds more than {vocab_size} tokens; is it another model's?")
        if vocab_size < BYTES + 256:
            raise CheckpointError(f"{path}: {vocab_size} tokens cannot hold the 256 bytes")
        return cls(pieces, scores)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids: characters (bytes where a character is no piece), best-scoring pair merged first."""
        ids: list[int] = []
        for character in " " + text if text else "":  # SentencePiece's dummy prefix
            raw = character.encode("utf-8")
            ids += [self._ids[raw]] if raw in self._ids else [BYTES + b for b in raw]
        while True:
            best, where, merged = -math.inf, -1, -1
            for i in range(len(ids) - 1):
                token = self._ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if token is not None and self.scores[token] > best:
                    best, where, merged = self.scores[token], i, token
            if where < 0:
                return [BOS, *ids] if bos else ids
            ids[where : where + 2] = [merged]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; BOS and EOS end nothing and print nothing, a space after BOS is dropped."""
        out, strip = b"", False
        for i in ids:
            if not 0 <= i < len(self.pieces):
                raise UsageError(f"token {i} is outside the vocabulary of {len(self.pieces)}")
            if i in (BOS, EOS):
                strip = i == BOS
                continue
            piece = bytes([i - BYTES]) if BYTES <= i < BYTES + 256 else self.pieces[i]
            out += piece[1:] if strip and piece.startswith(b" ") else piece
            strip = False
        return out.decode("utf-8", errors="replace")
