"""Token shards: flat files of ids, memory-mapped, with an index of documents and a manifest.

    data/manifest.json   digests, counts, sources (what `Shards.open` reads)
    data/<name>.bin      ids of all documents in a row, little-endian uint16 (uint32 above 65,536 ids)
    data/<name>.idx      little-endian uint64 [documents + 1]: where each document starts, and the end
    data/fates.jsonl     what became of every document: kept as number `index`, or dropped for a reason
    data/words.json      every word of the training text and how often it occurs

A text document begins with `<|bos|>`; a conversation is what the chat template renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glasshouse.base.digest import digest_of, sha256_file
from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.base.plan import DataPlan, Phase

MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype("<u8")
KINDS = ("text", "chat")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, eq=False)
class Shard:
    """A memory-mapped shard: `tokens` uint16 or uint32 [n_tokens], `offsets` uint64 [n_documents + 1]."""

    name: str
    kind: Literal["text", "chat"]
    tokens: np.ndarray
    offsets: np.ndarray
    digest: str
    validation: bool

    @property
    def n_documents(self) -> int:
        """How many documents it holds."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """How many ids it holds, special ones included."""
        return len(self.tokens)

    def document(self, i: int) -> np.ndarray:
        """Return the ids of document `i` (from 0), int64 [length]. Raises `DataError` if there is none."""
        if not 0 <= i < self.n_documents:
            raise DataError(f"shard '{self.name}' has documents 0 to {self.n_documents - 1}, not {i}")
        return np.asarray(self.tokens[int(self.offsets[i]) : int(self.offsets[i + 1])], dtype=np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Ids in each document, int64 [n_documents]."""
        return np.diff(self.offsets.astype(np.int64))


class Shards(Mapping[str, Shard]):
    """The shards of a data folder by name, in the manifest's order. Open them with `Shards.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: dict[str, Shard]) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> Shards:
        """Map the shards of a folder that `pack` wrote.

        Sizes are always checked against the manifest; with `verify` every file's SHA-256 is too. Raises
        `UsageError` if there is no manifest and `DataError` naming the file that is missing, cut or changed.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        if verify:
            _verify(folder, manifest)
        return cls(folder, manifest, {row["name"]: _open_shard(folder, row) for row in manifest["shards"]})

    def __getitem__(self, name: str) -> Shard:
        if name not in self._shards:
            raise DataError(f"{self.folder}: there is no shard '{name}'.{suggest(name, self._shards)}")
        return self._shards[name]

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the digest of every file."""
        return digest_of(self.manifest)

    @property
    def digests(self) -> dict[str, str]:
        """Each shard's digest, which covers its ids and its index."""
        return {name: shard.digest for name, shard in self._shards.items()}

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer that made the ids."""
        return str(self.manifest["tokenizer"])

    def plan(self, names: list[str] | None = None, weights: Mapping[str, float] | None = None) -> DataPlan:
        """Return a one-phase plan over training shards (`names`, by default all of them).

        Without `weights` a shard weighs its number of tokens (texts) or documents (chat), so that every
        part of the data is drawn equally often.
        """
        names = [n for n in self if not self[n].validation] if names is None else names
        size = {n: float(self[n].n_tokens if self[n].kind == "text" else self[n].n_documents) for n in names}
        chosen = dict(size if weights is None else weights)
        phase = Phase(from_step=0, weights=chosen)
        return DataPlan(phases=(phase,), digests={name: self[name].digest for name in chosen})

    @cached_property
    def words(self) -> dict[str, int]:
        """Every word of the training text and its count, from `words.json`."""
        return dict(json.loads((self.folder / "words.json").read_text("utf-8"))["words"])


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; is {path.parent} a data folder?")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        rows = manifest["shards"]
        for row in rows:
            _check_row(row)
        if manifest["version"] != 1 or not rows or len({row["name"] for row in rows}) != len(rows):
            raise ValueError("no shards, two of one name, or an unknown version")
        if set(manifest["files"]) != {"fates.jsonl", "words.json"} or not isinstance(
            manifest["tokenizer"], str
        ):
            raise ValueError("'files' or 'tokenizer' is not what was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a data manifest ({error}); pack the data again") from error
    return manifest


def _check_row(row: dict[str, Any]) -> None:
    name = row["name"]
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise ValueError(f"the shard name {name!r} is not a plain file name")
    if row["kind"] not in KINDS or row["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"shard {name}: unknown kind or dtype")
    for key in ("n_documents", "n_tokens"):
        if type(row[key]) is not int or row[key] < 1:
            raise ValueError(f"shard {name}: {key} is {row[key]!r}")
    # Only these two names, or a manifest could point outside its folder.
    if set(row["files"]) != {f"{name}.bin", f"{name}.idx"} or row["digest"] != digest_of(row["files"]):
        raise ValueError(f"shard {name}: 'files' and 'digest' do not agree")
    if type(row["validation"]) is not bool:
        raise ValueError(f"shard {name}: validation is {row['validation']!r}")


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    files = {file: digest for row in manifest["shards"] for file, digest in row["files"].items()}
    for name, expected in {**files, **manifest["files"]}.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing, though the manifest names it; pack the data again")
        found = sha256_file(path)
        if found != expected:
            raise DataError(
                f"{path}: changed since it was packed (SHA-256 {found[:12]}..., the manifest says "
                f"{expected[:12]}...); restore it or pack the data again"
            )


def _open_shard(folder: Path, row: dict[str, Any]) -> Shard:
    name, dtype = row["name"], np.dtype(row["dtype"]).newbyteorder("<")
    sizes = {
        f"{name}.bin": (dtype, row["n_tokens"]),
        f"{name}.idx": (INDEX_DTYPE, row["n_documents"] + 1),
    }
    maps = []
    for file, (kind, length) in sizes.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size != kind.itemsize * length:
            raise DataError(
                f"{path}: {'missing' if size < 0 else f'{size} bytes'}, expected {kind.itemsize * length}; "
                "restore it or pack the data again"
            )
        maps.append(np.memmap(path, dtype=kind, mode="r"))
    tokens, offsets = maps
    starts = offsets.astype(np.int64)
    if starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) <= 0).any():
        raise DataError(f"{folder / f'{name}.idx'}: the index does not fit its shard; pack the data again")
    return Shard(name, row["kind"], tokens, offsets, row["digest"], row["validation"])
