"""Read and write safetensors, trusting nothing that a file says about itself.

Format: 8 bytes little-endian header length, JSON header ``{name: {dtype, shape, data_offsets}}``,
then the tensors' bytes (https://github.com/huggingface/safetensors, "Format"). What that page requires
is checked here: unique names, sizes that follow from shapes, bytes that cover the file without hole or
overlap. What it leaves open is checked too: names, shapes and dtypes against those expected, and that
every number is finite. Nothing is allocated before the header agrees with the file's size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from glasshouse.base.atomic import write_bytes
from glasshouse.base.errors import CheckpointError, suggest

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
WEIGHTS = ("F32", "F16", "BF16")
MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
MAX_JSON = 100_000_000  # bytes of a config.json or an index
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype's name, shape, and bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(
    path: str | Path,
    expected: Shapes | None = None,
    *,
    dtype: torch.dtype | None = None,
    allowed: tuple[str, ...] = WEIGHTS,
    finite: bool = True,
    elsewhere: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Read every tensor of a file.

    ``expected``: exactly these names with these shapes (None: whatever is there). ``dtype``: convert
    floating tensors to it (None: as stored). ``allowed``: stored dtypes that are accepted, by their
    names in the format. ``elsewhere``: beginnings of names that are not read. Raises CheckpointError
    naming file, tensor and what is wrong with it.
    """
    path = Path(path)
    with _open(path) as file:
        header, start = _header(file, path)
        if expected is not None:
            match_names(str(path), {k: e.shape for k, e in header.items()}, expected)
        tensors: dict[str, Tensor] = {}
        for name, entry in header.items():
            if name.startswith(elsewhere):
                continue
            if entry.dtype not in allowed:
                raise CheckpointError(
                    f"{path}: {name!r} is stored as {entry.dtype}; accepted here: {', '.join(allowed)}"
                )
            tensors[name] = _tensor(file, start, path, name, entry, dtype, finite)
    return tensors


def read_header(path: str | Path) -> dict[str, Entry]:
    """The checked header of a file, by tensor name; reads no tensor. Raises CheckpointError."""
    path = Path(path)
    with _open(path) as file:
        return _header(file, path)[0]


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically; equal tensors give equal bytes. ``transformers`` wants ``format: pt``."""
    plain = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    write_bytes(path, _in_order(save(plain, {"format": "pt", **(metadata or {})})))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: the library writes several entries in a random order."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def read_folder(
    folder: str | Path,
    expected: Callable[[Shapes], Shapes],
    *,
    dtype: torch.dtype | None = None,
    elsewhere: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Read ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    ``expected`` gives the names and shapes to insist on, given those that are there; it sees headers
    only, so that a file of the wrong model is refused before any weight is read. Tensors whose names begin
    as ``elsewhere`` lists (a vision tower beside a text model) are neither expected nor read.
    """
    folder = Path(folder)
    shards = _shards(folder)
    found = {
        name: e.shape
        for shard, header in shards.items()
        for name, e in header.items()
        if not name.startswith(elsewhere)
    }
    match_names(str(folder), found, expected(found))
    tensors: dict[str, Tensor] = {}
    for shard, header in shards.items():
        shapes = {k: e.shape for k, e in header.items()}
        tensors.update(read_safetensors(shard, shapes, dtype=dtype, elsewhere=elsewhere))
    return tensors


def match_names(where: str, found: Shapes, expected: Shapes) -> None:
    """Raise CheckpointError unless ``found`` has exactly the expected names and shapes."""
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors missing, first {missing[0]!r}.{suggest(missing[0], surplus)}"
        )
    if surplus:
        raise CheckpointError(
            f"{where}: {len(surplus)} tensors do not belong to this model, first {surplus[0]!r}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"{where}: {name!r} has shape {list(found[name])}, not {list(shape)}")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no repeated key, no NaN. Raises CheckpointError."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are absurd for this file")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly, see ``read_json``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:  # readers disagree on which one counts
                raise CheckpointError(f"{where}: {key!r} appears twice")
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise CheckpointError(f"{where}: {name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{where} is not valid UTF-8 JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _header(file: BufferedReader, path: Path) -> tuple[dict[str, Entry], int]:
    """The checked header and where the tensors' bytes start."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
    raw = parse_json(file.read(length), f"{path} (header)")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must hold texts only")
    header = {name: _entry(path, name, value) for name, value in raw.items()}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise CheckpointError(f"{path}: the bytes of {name!r} overlap another tensor or leave a hole")
        end = entry.end
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is truncated or altered: its header needs {8 + length + end} bytes, it has {size}"
        )
    return header, 8 + length


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the header of {name!r} is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = (*shape, *offsets) if isinstance(shape, list) and isinstance(offsets, list) else (None,)
    # type, not isinstance: true is an int in Python
    if len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise CheckpointError(f"{path}: shape or offsets of {name!r} are malformed")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has dtype {dtype!r}; readable: {', '.join(DTYPES)}")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: {name!r} claims shape {shape} of {dtype} but has {offsets[1] - offsets[0]} bytes"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _tensor(
    file: BufferedReader,
    start: int,
    path: Path,
    name: str,
    entry: Entry,
    dtype: torch.dtype | None,
    finite: bool,
) -> Tensor:
    buffer = bytearray(entry.end - entry.begin)
    file.seek(start + entry.begin)
    if file.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{path} ended while {name!r} was read; was it changed meanwhile?")
    stored = DTYPES[entry.dtype]
    x = torch.frombuffer(buffer, dtype=stored) if buffer else torch.empty(0, dtype=stored)
    x = x.reshape(entry.shape)
    if finite and stored.is_floating_point and not bool(torch.isfinite(x).all()):
        raise CheckpointError(f"{path}: {name!r} holds NaN or infinite numbers; the file is damaged")
    return x.to(dtype) if dtype is not None and stored.is_floating_point else x


def _shards(folder: Path) -> dict[Path, dict[str, Entry]]:
    """Every weight file of a folder with its checked header; the index must agree with the shards."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: read_header(folder / SINGLE)}
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = f" {pickles[0]} is not read: it may hold a pickle, which can run code." if pickles else ""
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}.{hint} Save it as safetensors")
    index = read_json(folder / INDEX)
    where = f"{folder / INDEX}"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file and "\0" not in file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{where}: {name!r} is said to be in {file!r}, which is not a safetensors file beside it"
            )
    shards = {folder / f: read_header(folder / f) for f in sorted(set(weight_map.values()))}
    for shard, header in shards.items():
        for name in header:
            if weight_map.get(name) != shard.name:
                raise CheckpointError(f"{where}: {name!r} is in {shard.name}, but the index does not say so")
    absent = sorted(weight_map.keys() - {name for header in shards.values() for name in header})
    if absent:
        raise CheckpointError(f"{where}: {absent[0]!r} is not in {weight_map[absent[0]]}")
    return shards
