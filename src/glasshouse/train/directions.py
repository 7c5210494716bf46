"""Directions in activations, as files: a few vectors, the site they were taken at, and where they came from.

    directions/<sha256 of the file>.safetensors
        vectors   float32 [k, d_model]: what steering adds is the first; what is ablated is the span of all
        metadata  site, from: canonical JSON

A run keeps them by digest, whoever made them: a recipe's file is copied in, a gate writes its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from glasshouse.base.atomic import write_bytes
from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import CheckpointError, UsageError

FOLDER = "directions"


@dataclass(frozen=True, eq=False)
class Direction:
    """``vectors`` float32 [k, d_model] at ``site``; ``made`` says from what, as JSON."""

    site: str
    vectors: Tensor
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        v = self.vectors
        if v.ndim != 2 or v.shape[0] == 0 or v.dtype != torch.float32 or not torch.isfinite(v).all():
            raise UsageError(
                f"a direction at {self.site!r} is float32 [k, d_model] and finite, "
                f"not {v.dtype} {list(v.shape)}"
            )
        if float(v.norm(dim=1).min()) == 0.0:
            raise UsageError(f"a direction at {self.site!r} is zero: there is nothing to add or to remove")


def write_direction(run: Path, direction: Direction) -> str:
    """Write a direction into the folder of a run; return the SHA-256 that names it. Equal directions are
    equal bytes.
    """
    # One key of metadata: the library writes several in any order.
    vectors = direction.vectors.detach().cpu().contiguous()
    body = safetensors.torch.save(
        {"vectors": vectors},
        {"about": canonical_json({"site": direction.site, "from": dict(direction.made)}).decode()},
    )
    return keep(run, body)


def keep(run: Path, body: bytes) -> str:
    """Keep a direction's file in the run by its digest; return that."""
    digest = sha256_bytes(body)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    write_bytes(folder / f"{digest}.safetensors", body)
    return digest


def artifact(sha256: str) -> str:
    """The file's path within the run."""
    return f"{FOLDER}/{sha256}.safetensors"


def read_direction(run: Path, sha256: str) -> Direction:
    """The direction with this digest. CheckpointError when the file is gone, changed, or holds none."""
    path = run / artifact(sha256)
    try:
        body = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}), but this run trains with that direction: restore it"
        ) from error
    if sha256_bytes(body) != sha256:
        raise CheckpointError(f"{path} was changed after it was written: restore it, or start a new run")
    return parsed(body, str(path))


def parsed(body: bytes, where: str) -> Direction:
    """The direction that a file's bytes hold. CheckpointError when they hold none."""
    try:
        vectors = safetensors.torch.load(body)["vectors"]
        length = int.from_bytes(body[:8], "little")
        about = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["about"])
        return Direction(about["site"], vectors, about["from"])
    except (safetensors.SafetensorError, KeyError, ValueError, UsageError) as error:
        raise CheckpointError(f"{where} is not a direction's file: {error}") from error
