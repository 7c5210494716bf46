from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from glasshouse.base.errors import CheckpointError
from glasshouse.model.weights import (
    INDEX,
    read_folder,
    read_header,
    read_json,
    read_safetensors,
    write_safetensors,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(0, 2)}


def raw_file(path: Path, header: Any, payload: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


def f32(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def test_what_is_written_is_read_back_by_us_and_by_the_reference(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, TENSORS, {"step": "3"})
    for back in (read_safetensors(path, {k: tuple(v.shape) for k, v in TENSORS.items()}), load_file(path)):
        assert back.keys() == TENSORS.keys()
        assert all(torch.equal(back[k], TENSORS[k]) for k in TENSORS)
    first = path.read_bytes()
    write_safetensors(path, dict(reversed(TENSORS.items())), {"step": "3"})
    assert path.read_bytes() == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precisions_are_exact_and_widen_on_request(tmp_path, dtype):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_safetensors(tmp_path / "w", {"x": x})
    assert torch.equal(read_safetensors(tmp_path / "w")["x"], x)
    assert torch.equal(read_safetensors(tmp_path / "w", dtype=torch.float32)["x"], x.float())


def test_integers_are_read_only_where_allowed_and_never_converted(tmp_path):
    write_safetensors(tmp_path / "w", {"n": torch.tensor([1, 2**40])})
    with pytest.raises(CheckpointError, match="stored as I64; accepted here: F32, F16, BF16"):
        read_safetensors(tmp_path / "w")
    back = read_safetensors(tmp_path / "w", allowed=("I64",), dtype=torch.float32)["n"]
    assert back.tolist() == [1, 2**40]


def test_trained_in_place_a_read_tensor_does_not_warn(tmp_path):
    write_safetensors(tmp_path / "w", TENSORS)
    found = read_safetensors(tmp_path / "w")["a"].add_(1)  # a warning is an error in all tests
    assert torch.equal(found, TENSORS["a"] + 1)
    assert torch.equal(read_safetensors(tmp_path / "w")["a"], TENSORS["a"]), "the file stays as it was"


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": (2, 3), "b": (4,)}, "do not belong"),
        ({"a": (2, 3), "b": (4,), "c": (0, 2), "d": (1,)}, "missing, first 'd'"),
        ({"a": (3, 2), "b": (4,), "c": (0, 2)}, r"'a' has shape \[2, 3\], not \[3, 2\]"),
    ],
)
def test_names_and_shapes_are_insisted_on(tmp_path, expected, message):
    write_safetensors(tmp_path / "w", TENSORS)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path / "w", expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_must_be_finite(tmp_path, bad):
    write_safetensors(tmp_path / "w", {"fine": torch.ones(3), "x": torch.tensor([1.0, bad])})
    with pytest.raises(CheckpointError, match="'x' holds NaN or infinite"):
        read_safetensors(tmp_path / "w")


FOUR = b"\0" * 16
HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "repeated name": (
        b'{"x":%s,"x":%s}' % ((json.dumps(f32([4], 0, 16)).encode(),) * 2),
        FOUR,
        "appears twice",
    ),
    "absurd shape": ({"x": f32([2**40, 2**40], 0, 16)}, FOUR, "claims shape"),
    "overflowing shape": ({"x": f32([2**62, 4], 0, 0)}, b"", "claims shape"),
    "negative shape": ({"x": f32([-4, -1], 0, 16)}, FOUR, "malformed"),
    "boolean shape": ({"x": f32([True], 0, 4)}, b"\0" * 4, "malformed"),
    "fractional shape": ({"x": f32([4.0], 0, 16)}, FOUR, "malformed"),
    "overlap": ({"x": f32([4], 0, 16), "y": f32([4], 0, 16)}, FOUR, "overlap"),
    "hole": ({"x": f32([2], 0, 8), "y": f32([1], 12, 16)}, FOUR, "hole"),
    "reversed offsets": ({"x": f32([4], 16, 0)}, FOUR, "claims shape"),
    "beyond the end": ({"x": f32([8], 0, 32)}, FOUR, "truncated or altered"),
    "trailing bytes": ({"x": f32([2], 0, 8)}, FOUR, "truncated or altered"),
    "unknown dtype": ({"x": {**f32([4], 0, 16), "dtype": "F8_E4M3"}}, FOUR, "has dtype"),
    "dtype of another type": ({"x": {**f32([4], 0, 16), "dtype": ["F32"]}}, FOUR, "has dtype"),
    "extra key": ({"x": {**f32([4], 0, 16), "code": "x"}}, FOUR, "malformed"),
    "not an object": ([1, 2], b"", "JSON object"),
    "not JSON": (b"{{{{", b"", "not valid"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid"),
    "deep nesting": (b"[" * 100_000, b"", "not valid"),
    "NaN in JSON": (b'{"x": NaN}', b"", "NaN is not JSON"),
    "metadata of another type": ({"__metadata__": {"a": 1}, "x": f32([4], 0, 16)}, FOUR, "texts only"),
    "endless number": (b'{"x": %s}' % (b"9" * 5000), b"", "not valid|malformed"),
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_headers_are_refused(tmp_path, what):
    header, payload, message = HOSTILE[what]
    path = raw_file(tmp_path / "w", header, payload)
    for read in (read_safetensors, read_header):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path):
    for length in (2**63, 10**9, 10**6):
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_safetensors(raw_file(tmp_path / "w", {}, length=length))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors(tmp_path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_as_other_numbers_or_refused_but_never_crashes(tmp_path, data):
    path = tmp_path / "w"
    write_safetensors(path, TENSORS)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            read_safetensors(path)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read_safetensors(path, {k: tuple(v.shape) for k, v in TENSORS.items()})
    except CheckpointError as error:
        assert str(path) in str(error)


NUMBERS = st.one_of(
    st.integers(0, 6), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 1.0, True, None, "2"])
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F32", "BF16", "I64", "U8", "F8_E4M3", "", None]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header and how many bytes follow it: consistent, but for some entries that say anything."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.text(max_size=4), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = 4 * int(np.prod(shape))
        honest = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        header[name] = draw(st.one_of(st.just(honest), st.just(honest), st.just(honest), ENTRY))
        at += size
    return header, at + draw(st.sampled_from([0, 0, 0, 1, 4]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=headers())
def test_a_header_that_we_accept_the_reference_accepts_with_the_same_shapes(tmp_path, made):
    header, size = made
    path = raw_file(tmp_path / "w", header, b"\0" * size)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(ours)
        assert all(tuple(file.get_slice(k).get_shape()) == ours[k].shape for k in ours)


def test_tensors_of_another_part_are_neither_expected_nor_read(tmp_path):
    tensors = {"a": torch.ones(2), "tower.x": torch.full((3,), float("nan")), "tower.n": torch.tensor([1])}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    back = read_folder(tmp_path, lambda found: {"a": (2,)}, elsewhere=("tower.",))
    assert back.keys() == {"a"}
    with pytest.raises(CheckpointError, match="do not belong"):
        read_folder(tmp_path, lambda found: {"a": (2,)})


def sharded(folder: Path, weight_map: Any, extra: dict[str, torch.Tensor] | None = None) -> Path:
    write_safetensors(folder / "one.safetensors", {"a": TENSORS["a"]})
    write_safetensors(folder / "two.safetensors", {"b": TENSORS["b"], **(extra or {})})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


GOOD = {"a": "one.safetensors", "b": "two.safetensors"}


def test_shards_are_read_as_one(tmp_path):
    back = read_folder(sharded(tmp_path, GOOD), lambda found: {"a": (2, 3), "b": (4,)})
    assert torch.equal(back["a"], TENSORS["a"]) and torch.equal(back["b"], TENSORS["b"])


@pytest.mark.parametrize(
    "file",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "x/../one.safetensors",
        "..",
        "",
        "one.bin",
        7,
        None,
        "a\0b",
    ],
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, file):
    inside = tmp_path / "model"
    inside.mkdir()
    write_safetensors(tmp_path / "one.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(CheckpointError, match="not a safetensors file beside it"):
        read_folder(sharded(inside, {**GOOD, "a": file}), lambda found: found)


@pytest.mark.parametrize(
    ("weight_map", "extra", "message"),
    [
        ({"a": "one.safetensors"}, None, None),
        ({**GOOD, "z": "two.safetensors"}, None, "'z' is not in two"),
        (GOOD, {"a": TENSORS["a"]}, "'a' is in two.safetensors, but the index does not say so"),
        ({**GOOD, "a": "three.safetensors"}, None, "cannot be read"),
        ({}, None, "no weight_map"),
        ([], None, "no weight_map"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path, weight_map, extra, message):
    folder = sharded(tmp_path, weight_map, extra)
    if message is None:  # a shard that the index does not name is not opened
        assert read_folder(folder, lambda found: found).keys() == {"a"}
        return
    with pytest.raises(CheckpointError, match=message):
        read_folder(folder, lambda found: found)


def test_pickles_are_named_and_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read"):
        read_folder(tmp_path, lambda found: found)


def test_json_is_read_strictly(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (('{"a": 1, "a": 2}', "twice"), ('{"a": Infinity}', "not JSON"), ("[]", "object")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid UTF-8 JSON"):
        read_json(path)
