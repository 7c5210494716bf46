"""Compiled transformers compute what their files say: checked by an independent forward pass in numpy."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import Taps
from glasshouse.model.compiled_circuits import CompiledProgram, load_compiled

SHARED = Path(__file__).resolve().parents[3] / "shared" / "circuits"
D, HEADS, KEY, HIDDEN, LAYERS, LENGTH = 7, 2, 3, 5, 2, 6
ABOUT: dict[str, Any] = {
    **{"name": "toy", "n_layers": LAYERS, "n_heads": HEADS, "key_size": KEY, "d_model": D},
    **{"mlp_hidden": HIDDEN, "causal": False, "layer_norm": False, "activation": "relu"},
    **{"max_seq_len": LENGTH, "residual_labels": [f"dim{i}" for i in range(D)]},
    "input_encoding": {"BOS": 0, "a": 1, "b": 2, "c": 3},
    **{"output_encoding": {"x": 1, "y": 0, "z": 2}, "output_dims": [4, 1, 6]},
    "edges": [["embed", "a0.h0<q>"], ["m1", "logits"]],
}
SEQUENCES = [["BOS", "a"], ["BOS", "c", "b", "a"], ["BOS", "b", "b", "c", "a", "c"]]


def arrays() -> dict[str, np.ndarray]:
    """Random weights under tracr's names, [in, out]."""
    rng = np.random.default_rng(0)
    shapes = {"token_embed.embeddings": (4, D), "pos_embed.embeddings": (LENGTH, D)}
    for i in range(LAYERS):
        at = f"transformer.layer_{i}"
        for name in ("query", "key", "value"):
            shapes |= {f"{at}.attn.{name}.w": (D, HEADS * KEY), f"{at}.attn.{name}.b": (HEADS * KEY,)}
        shapes |= {f"{at}.attn.linear.w": (HEADS * KEY, D), f"{at}.attn.linear.b": (D,)}
        shapes |= {f"{at}.mlp.linear_1.w": (D, HIDDEN), f"{at}.mlp.linear_1.b": (HIDDEN,)}
        shapes |= {f"{at}.mlp.linear_2.w": (HIDDEN, D), f"{at}.mlp.linear_2.b": (D,)}
    return {name: rng.normal(0, 0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}


def forward(w: dict[str, np.ndarray], about: dict[str, Any], ids: list[int]) -> np.ndarray:
    """The final stream [pos, d_model] in float64, from the description alone."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    x = w["token_embed.embeddings"][ids] + w["pos_embed.embeddings"][: len(ids)]
    for i in range(about["n_layers"]):

        def linear(y: np.ndarray, name: str, layer: int = i) -> np.ndarray:
            at = f"transformer.layer_{layer}.{name}"
            return y @ w[f"{at}.w"] + w[f"{at}.b"]

        q, k, v = (linear(x, f"attn.{name}") for name in ("query", "key", "value"))
        made, size = [], about["key_size"]
        for h in range(about["n_heads"]):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size)
            pattern = np.exp(scores - scores.max(axis=1, keepdims=True))
            made.append(pattern / pattern.sum(axis=1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(made, axis=1), "attn.linear")
        x = x + linear(np.maximum(linear(x, "mlp.linear_1"), 0), "mlp.linear_2")
    return x


def write(folder: Path, weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    np.savez(folder / "toy.npz", **(arrays() if weights is None else weights))
    (folder / "toy.json").write_text(json.dumps({**ABOUT, **changes}))
    return folder / "toy.npz"


@pytest.mark.parametrize("sequence", SEQUENCES)
@torch.no_grad()
def test_the_stream_and_the_logits_are_those_of_an_independent_forward(tmp_path, sequence):
    program = load_compiled(write(tmp_path))
    wanted = forward(arrays(), ABOUT, [ABOUT["input_encoding"][s] for s in sequence])
    with Taps(read=["blocks.1.resid_post"]) as taps:
        logits = program.model(program.encode(sequence), taps)
    assert np.abs(taps["blocks.1.resid_post"][0].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert torch.equal(logits[0, :, :3], taps["blocks.1.resid_post"][0][:, [4, 1, 6]])
    best = wanted[1:][:, [4, 1, 6]].argmax(axis=1)
    assert program.run(sequence) == [("y", "x", "z")[i] for i in best]


def test_a_program_with_more_outputs_than_inputs_is_loaded(tmp_path):
    outputs = {"output_encoding": {str(i): i for i in range(D)}, "output_dims": list(range(D))}
    program = load_compiled(write(tmp_path, **outputs))
    wanted = forward(arrays(), ABOUT, [0, 3, 1])
    with torch.no_grad():
        logits = program.model(program.encode(["BOS", "c", "a"]))
    assert np.abs(logits[0].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_every_position_sees_every_other(tmp_path):
    program = load_compiled(write(tmp_path))
    with torch.no_grad(), Taps(read=["blocks.0.pattern"]) as taps:
        program.model(program.encode(SEQUENCES[2]), taps)
    assert bool((taps["blocks.0.pattern"] > 0).all())


def test_what_is_known_about_the_program_comes_along(tmp_path):
    program = load_compiled(write(tmp_path))
    assert program.edges() == {("embed", "a0.h0<q>"), ("m1", "logits")}
    assert program.residual_labels[3] == "dim3" and program.name == "toy"
    with pytest.raises(UsageError, match="lists no 'causal_edges'"):
        program.edges("causal_edges")
    with pytest.raises(UsageError, match="no input 'q'; it has BOS, a, b, c"):
        program.run(["BOS", "q"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm": True}, "layer_norm must be False"),
        ({"activation": "gelu"}, "activation must be 'relu'"),
        ({"n_layers": 3}, r"'transformer.layer_2.attn.query.w' is missing"),
        ({"n_layers": 1}, "does not belong to this model"),
        ({"d_model": 8, "residual_labels": ["x"] * 8}, r"has shape \[4, 7\]"),
        ({"d_model": "7"}, "d_model"),
        ({"max_seq_len": 2**40}, "absurd"),
        ({"residual_labels": []}, "residual_labels must name all 7"),
        ({"output_dims": [4, 1, 7]}, "output_dims must lie in 0..6"),
        ({"output_dims": [4, 4, 6]}, "different dimensions"),
        ({"output_dims": None}, "different dimensions, not None"),
        ({"output_dims": [4, 1]}, "differ in length"),
        ({"input_encoding": {"BOS": 0, "a": 2}}, "must number its symbols"),
        ({"causal": None}, "causal"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_compiled(write(tmp_path, **changes))


def npy(header: str, payload: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


def hostile(folder: Path, member: bytes) -> Path:
    path = write(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pos_embed.embeddings.npy", member)
    return path


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }"), "absurd"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2), }", b"\0" * 8), "do not match"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8), "only float32"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1])), "only float32"),
        (b"nothing of the kind", "not a readable .npz"),
        (b"\x93NUMPY\x03\x00", "version"),
    ],
)
def test_hostile_archives_are_refused_and_no_pickle_is_opened(tmp_path, member, message):
    with pytest.raises(CheckpointError, match=message):
        load_compiled(hostile(tmp_path, member))


def test_what_is_no_archive_is_named(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CheckpointError, match=r"toy\.npz is not a readable"):
        load_compiled(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"toy\.npz cannot be read"):
        load_compiled(path)
    bad = {**arrays(), "pos_embed.embeddings": np.full((LENGTH, D), np.nan, dtype=np.float32)}
    with pytest.raises(CheckpointError, match="NaN"):
        load_compiled(write(tmp_path, bad))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pos_embed.embeddings.npy", b"")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="appears twice"):
        load_compiled(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the compiled programs are not at {SHARED}")
@pytest.mark.parametrize("name", ["reverse", "hist"])
def test_the_compiled_programs_answer_all_their_examples(name):
    program: CompiledProgram = load_compiled(SHARED / f"{name}.npz")
    examples = json.loads((SHARED / f"{name}.io.json").read_text())
    assert len(examples) == 200
    for example in examples:
        wanted = [y if isinstance(y, str) else str(int(y)) for y in example["y"]]
        assert program.run(example["x"]) == wanted, example["x"]
    assert program.edges("causal_edges") <= program.edges() <= program.edges("candidate_edges")
