"""Features from gate to gate: under which id one goes, and whether a person has named it.

A feature is the same as one of the gate before when both fire at the same positions (correlation of their
activations on the same differences), whatever their numbers; a label belongs to a direction (cosine).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from glasshouse.base.atomic import write_bytes, write_json
from glasshouse.base.digest import digest_of, sha256_bytes
from glasshouse.base.errors import DataError
from glasshouse.interp.dictionaries.changes import Encoded, matched, unit_directions
from glasshouse.interp.dictionaries.config import DictionaryConfig
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.verify.examination import Examination

SAME = 0.7  # correlation of activations from which a feature is the one of the gate before
LABELLED = 0.9  # cosine with a labelled direction from which a label holds
INDEX = "features.json"


@dataclass(frozen=True)
class Known:
    """Who a feature is: its id, the label of a person if there is one, and how its activations correlate with
    those of that id at the gate before (None: it is new).
    """

    id: str
    label: str | None = None
    seen_before: float | None = None


@dataclass(frozen=True)
class Left:
    """What the gate before left for one site: its dictionary, and the ids of features by number."""

    dictionary: Dictionary
    ids: Mapping[int, str]


def left_for(exam: Examination, site: str) -> Left | None:
    """What the last verdict of this constraint left for ``site``; None when there is nothing.

    DataError for files that are not what a verdict writes.
    """
    folder = exam.around.last
    if folder is None or not (folder / INDEX).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if site not in index["dictionaries"]:
            return None
        dictionary = Dictionary(DictionaryConfig(**index["dictionaries"][site]))
        tensors = safetensors.torch.load_file(folder / _file(site))
        dictionary.load_state_dict(tensors)
        ids = {int(f["number"]): str(f["id"]) for f in index["features"] if f["site"] == site}
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, safetensors.SafetensorError) as problem:
        raise DataError(f"{folder}: not what an earlier gate leaves of its features ({problem})") from problem
    return Left(dictionary.eval(), ids)


def identify(
    exam: Examination, site: str, dictionary: Dictionary, found: Encoded, left: Left | None
) -> list[Known]:
    """Every feature's id, label and past, by number."""
    unit = unit_directions(dictionary)
    names = labels_of(exam, site, unit.shape[1])
    ids = [f"f-{digest_of([site, [round(v, 4) for v in row]])[:10]}" for row in unit.tolist()]
    past: list[float | None] = [None] * len(ids)
    if left is not None and left.ids:
        numbers = sorted(left.ids)
        with torch.no_grad():
            old = left.dictionary.encode(found.x)[:, numbers]
        # An id goes to the one feature that follows it best.
        which, how = matched(old, found.features)
        for k, number in enumerate(numbers):
            now, correlation = int(which[k]), float(how[k])
            if correlation >= SAME and correlation > (past[now] or 0.0):
                ids[now], past[now] = left.ids[number], correlation
    return [Known(i, _label(unit[n], names), p) for n, (i, p) in enumerate(zip(ids, past, strict=True))]


def _label(direction: Tensor, names: Sequence[tuple[str, Tensor]]) -> str | None:
    return next((name for name, known in names if float(direction @ known) >= LABELLED), None)


def labels_of(exam: Examination, site: str, width: int) -> list[tuple[str, Tensor]]:
    """Labels and unit directions [d] that a person has accepted for ``site``.

    The file holds ``{"features": [{"site": ..., "label": ..., "direction": [...]}]}``, rows as a verdict's
    features.json has them, a label written in. DataError for a file that is missing or differs from its
    digest, and for a malformed row.
    """
    spec = exam.constraint.labels
    if spec is None:
        return []
    path = exam.folder / spec.path
    if not path.is_file():
        raise DataError(f"{path}: no such file of labels")
    raw = path.read_bytes()
    if (digest := sha256_bytes(raw)) != spec.sha256:
        raise DataError(f"{path}: sha256 is {digest}, the constraint declares {spec.sha256}")
    found = []
    try:
        for number, row in enumerate(json.loads(raw)["features"]):
            if not isinstance(row["label"], str) or not row["label"].strip():
                raise ValueError(f"feature {number} has no label")
            if row["site"] != site:
                continue
            direction = torch.tensor(row["direction"], dtype=torch.float32)
            if direction.shape != (width,) or not float(direction.norm()) > 0:
                raise ValueError(f"the direction of feature {number} is not {width} numbers")
            found.append((row["label"], direction / direction.norm()))
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path}: not a file of labels ({problem})") from problem
    return found


def keep(
    exam: Examination, dictionaries: Mapping[str, Dictionary], features: Sequence[dict[str, Any]]
) -> None:
    """Write the dictionaries and the reported features where the next gate will look for them."""
    out: Path | None = exam.around.out
    if out is None:
        return
    for site, dictionary in dictionaries.items():
        tensors = {name: t.detach().contiguous() for name, t in dictionary.state_dict().items()}
        write_bytes(out / _file(site), safetensors.torch.save(tensors))
    configs = {site: d.config.model_dump(mode="json") for site, d in dictionaries.items()}
    write_json(out / INDEX, {"dictionaries": configs, "features": list(features)})


def _file(site: str) -> str:
    return f"dictionary-{site}.safetensors"
