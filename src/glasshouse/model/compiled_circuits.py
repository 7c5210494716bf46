"""Load transformers compiled from RASP programs, whose circuits are known (tracr: Lindner et al. 2023).

Two files: ``NAME.npz`` with float32 matrices [in, out] under tracr's names, ``NAME.json`` with the shape, the
vocabulary, which dimensions of the stream are the output, and the edges of the true circuit. Such a model
has no norms, ReLU, learned positions, biases everywhere and attention in both directions. It has no
unembedding either: the head picks the output dimensions out of the final stream, so the first logits are
those dimensions. A program with fewer outputs than inputs has further logits that are always zero; one with
more has further token ids that embed as zero.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.config import GPTConfig
from glasshouse.model.gpt import GPT
from glasshouse.model.weights import read_json

LARGEST = 2**28  # bytes of one matrix; compiled programs have thousands
LAYER = {
    **{"attn.q": "attn.query", "attn.k": "attn.key", "attn.v": "attn.value", "attn.o": "attn.linear"},
    **{"mlp.up": "mlp.linear_1", "mlp.down": "mlp.linear_2"},
}
SHAPE = {
    **{"context": "max_seq_len", "d_model": "d_model", "n_layer": "n_layers", "n_head": "n_heads"},
    **{"d_head": "key_size", "d_mlp": "mlp_hidden", "causal": "causal"},
}
ALWAYS: dict[str, Any] = {
    **{"norm": "none", "position": "learned", "mlp": "plain", "activation": "relu", "tied": False},
    **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
}
Edge = tuple[str, str]  # writer, reader: embed, pos_embed, a{layer}.h{head}[<q|k|v>], m{layer}, logits


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled transformer and what is known about it.

    ``tokens``: input symbol -> id. ``outputs``: the symbol (or number) that each logit stands for.
    ``residual_labels``: what each dimension of the stream means. ``about``: everything else in the file.
    """

    name: str
    model: GPT
    tokens: dict[str, int]
    outputs: tuple[str, ...]
    residual_labels: tuple[str, ...]
    about: dict[str, Any]

    def encode(self, symbols: Sequence[str]) -> Tensor:
        """Token ids int64 [1, pos] of input symbols, which begin with BOS. UsageError for an unknown one."""
        unknown = [s for s in symbols if s not in self.tokens]
        if unknown:
            raise UsageError(f"{self.name} has no input {unknown[0]!r}; it has {', '.join(self.tokens)}")
        return torch.tensor([[self.tokens[s] for s in symbols]])

    def run(self, symbols: Sequence[str]) -> list[str]:
        """The program's output at every position after BOS."""
        with torch.no_grad():
            best = self.model(self.encode(symbols))[0, 1:, : len(self.outputs)].argmax(dim=-1)
        return [self.outputs[i] for i in best.tolist()]

    def edges(self, kind: str = "edges") -> frozenset[Edge]:
        """The edges listed under ``kind``: edges, candidate_edges, causal_edges, zero_ablation_edges, ..."""
        listed = self.about.get(kind)
        if not isinstance(listed, list) or not all(
            isinstance(e, list) and len(e) == 2 and all(isinstance(end, str) for end in e) for e in listed
        ):
            raise UsageError(f"{self.name} lists no {kind!r}")
        return frozenset((writer, reader) for writer, reader in listed)


def load_compiled(path: str | Path, about: str | Path | None = None) -> CompiledProgram:
    """Load ``NAME.npz`` with its ``NAME.json`` (``about``; default: beside it, of the same name).

    Raises CheckpointError naming file, tensor and what is wrong; nothing in the files is executed.
    """
    path = Path(path)
    where = Path(about) if about is not None else path.with_suffix(".json")
    described = read_json(where)
    config, outputs = _config(where, described)
    arrays = _read_npz(path)
    model = GPT(config)
    n_inputs = len(described["input_encoding"])
    state = {
        name: _take(path, arrays, name, tuple(p.shape), n_inputs, outputs)
        for name, p in model.named_parameters()
    }
    if arrays:
        raise CheckpointError(f"{path}: {min(arrays)!r} does not belong to this model")
    model.load_state_dict(state)
    return CompiledProgram(
        name=str(described.get("name", path.stem)),
        model=model.eval(),
        tokens=described["input_encoding"],
        outputs=tuple(sorted(described["output_encoding"], key=described["output_encoding"].__getitem__)),
        residual_labels=tuple(described["residual_labels"]),
        about=described,
    )


def _config(where: Path, about: dict[str, Any]) -> tuple[GPTConfig, list[int]]:
    """The shape, and the dimensions that are the output."""
    for key, wanted in (("layer_norm", False), ("activation", "relu")):
        if about.get(key) != wanted:
            raise CheckpointError(f"{where}: {key} must be {wanted!r}, not {about.get(key)!r}")
    tokens = _encoding(where, about, "input_encoding")
    outputs, labels = about.get("output_dims"), about.get("residual_labels")
    shape: dict[str, Any] = {
        "vocab_size": max(len(tokens), len(_encoding(where, about, "output_encoding"))),
        **{feature: about.get(key) for feature, key in SHAPE.items()},
    }
    try:
        config = GPTConfig(**shape, **ALWAYS)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    if max(config.d_model, config.context, config.n_layer, config.n_head, config.mlp_width) > 2**16:
        raise CheckpointError(f"{where}: the shape is absurd for a compiled program")
    if not isinstance(labels, list) or len(labels) != config.d_model:
        raise CheckpointError(f"{where}: residual_labels must name all {config.d_model} dimensions")
    dims = outputs if isinstance(outputs, list) else []
    if not dims or len(set(map(str, dims))) < len(dims):
        raise CheckpointError(f"{where}: output_dims must list different dimensions, not {outputs!r}")
    if not all(type(d) is int and 0 <= d < config.d_model for d in dims):
        raise CheckpointError(f"{where}: output_dims must lie in 0..{config.d_model - 1}")
    if len(_encoding(where, about, "output_encoding")) != len(dims):
        raise CheckpointError(f"{where}: output_encoding and output_dims differ in length")
    return config, dims


def _encoding(where: Path, about: dict[str, Any], key: str) -> dict[str, int]:
    """A table of symbols whose values are 0, 1, 2, ..."""
    table = about.get(key)
    if not isinstance(table, dict) or sorted(map(str, table.values())) != sorted(map(str, range(len(table)))):
        raise CheckpointError(f"{where}: {key} must number its symbols 0, 1, 2, ...")
    return table


def _take(
    path: Path,
    arrays: dict[str, np.ndarray],
    name: str,
    shape: tuple[int, ...],
    n_inputs: int,
    outputs: list[int],
) -> Tensor:
    """Our parameter from tracr's arrays; what is taken is removed from ``arrays``."""
    parts = name.split(".")
    if name == "head.weight":  # one row for every output: all zero but at its dimension
        head = torch.zeros(shape)
        head[torch.arange(len(outputs)), torch.tensor(outputs)] = 1.0
        return head
    if parts[0] == "blocks":
        theirs = f"transformer.layer_{parts[1]}.{LAYER['.'.join(parts[2:4])]}.{parts[4][0]}"
    else:
        theirs = {"embed": "token_embed.embeddings", "pos": "pos_embed.embeddings"}[parts[0]]
    if theirs not in arrays:
        raise CheckpointError(f"{path}: {theirs!r} is missing")
    x = torch.from_numpy(arrays.pop(theirs))
    if name == "embed.weight" and x.ndim == 2 and n_inputs == len(x) < shape[0]:
        x = torch.cat((x, torch.zeros(shape[0] - len(x), x.shape[1])))
    x = x.T.contiguous() if parts[0] == "blocks" and x.ndim == 2 else x
    if tuple(x.shape) != shape:
        raise CheckpointError(
            f"{path}: {theirs!r} has shape {list(x.shape)} (as [out, in]), not {list(shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise CheckpointError(f"{path}: {theirs!r} holds NaN or infinite numbers; the file is damaged")
    return x


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz: float32 only (an object array would be a pickle), sizes checked first."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise CheckpointError(f"{path}: a name appears twice")
            arrays = {}
            for name in names:
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = _read_npy(path, name, file)
            return arrays
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable .npz file: {error}") from error


def _read_npy(path: Path, name: str, file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise CheckpointError(f"{path}: {name!r} is of .npy version {version}, which is not read")
    shape, fortran, dtype = readers[version](file)
    if dtype != np.dtype("<f4"):
        raise CheckpointError(f"{path}: {name!r} holds {dtype}; only float32 is read")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize if shape else dtype.itemsize
    if size > LARGEST:
        raise CheckpointError(f"{path}: {name!r} claims shape {list(shape)}, which is absurd")
    raw = file.read(size + 1)
    if len(raw) != size:
        raise CheckpointError(f"{path}: {name!r} claims shape {list(shape)} but its bytes do not match it")
    flat = np.frombuffer(bytearray(raw), dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
