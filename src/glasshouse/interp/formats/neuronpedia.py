"""Feature pages as the files that Neuronpedia exports and imports.

``v1/MODEL/SOURCE/{features,activations,explanations}/batch-N.jsonl.gz``, one object a line, with the fields
of Neuronpedia's ``Neuron``, ``Activation`` and ``Explanation`` tables (``schema.prisma``). Fields that say
what we did not measure (correlated neurons, neuron alignment, ...) are left out; their columns have defaults.
Equal pages give equal bytes: no clock, no random identifiers, no time in the gzip header.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glasshouse.base.atomic import write_bytes
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.formats.hooks import hook_name
from glasshouse.interp.formats.pages import Page
from glasshouse.model import GPTConfig
from glasshouse.model.weights import parse_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KINDS = ("features", "activations", "explanations")
MAX_UNPACKED = 2**30  # bytes of one batch, against files that unpack to more than a machine holds
REQUIRED: dict[str, dict[str, type]] = {
    "features": {"modelId": str, "layer": str, "index": str, "maxActApprox": float, "frac_nonzero": float},
    "activations": {"modelId": str, "layer": str, "index": str, "tokens": list, "values": list},
    "explanations": {"modelId": str, "layer": str, "index": str, "description": str},
}


@dataclass(frozen=True)
class Source:
    """Where pages belong on Neuronpedia.

    ``model``: its identifier of the model; ``source``: of the dictionary, by its custom
    ``{layer}-{set}``, such as ``3-res-4k``. ``site``: what the decoder writes to. ``creator``: an account's
    identifier; ``created``: an ISO time, which is an argument so that files do not depend on the clock.
    """

    model: str
    source: str
    site: str
    creator: str = ""
    created: str = "1970-01-01T00:00:00Z"

    def __post_init__(self) -> None:
        for what in (self.model, self.source):
            if not NAME.fullmatch(what):
                raise UsageError(f"{what!r} must be letters, digits, '.', '_' or '-': it names a folder")


@dataclass(frozen=True)
class Explanation:
    """A description of a feature, by which method (``kind``) and which model, and its scores by name."""

    description: str
    kind: str | None = None
    model: str | None = None
    scores: tuple[tuple[str, float], ...] = ()


def write_pages(
    folder: str | Path,
    source: Source,
    batch: int,
    pages: Sequence[Page],
    text: Callable[[int], str],
    explanations: Mapping[int, Explanation] | None = None,
) -> list[Path]:
    """Write one batch of pages below ``folder``; returns the files written.

    ``text`` gives a token's text. ``explanations`` by feature; UsageError for one without its page.
    """
    given: Mapping[int, Explanation] = explanations or {}
    absent = sorted(given.keys() - {page.index for page in pages})
    if absent:
        raise UsageError(f"features {absent} are explained but have no page in this batch")
    if batch < 0 or not pages:
        raise UsageError(f"batch {batch} of {len(pages)} pages: a batch has a number from 0 and some pages")
    lines: dict[str, list[dict[str, Any]]] = {
        "features": [_feature(p, source, text) for p in pages],
        "activations": [a for p in pages for a in _activations(p, source, text)],
        "explanations": [_explanation(i, e, source) for i, e in sorted(given.items())],
    }
    written = []
    for kind in KINDS:
        if lines[kind] or kind != "explanations":
            path = batch_path(folder, source, kind, batch)
            write_bytes(path, _pack(lines[kind]))
            written.append(path)
    return written


def write_source(folder: str | Path, source: Source, config: GPTConfig, *, data: str, rows: Tensor) -> None:
    """Write ``model.jsonl``, ``sourceset.jsonl`` and ``source.jsonl``, without which nothing is imported.

    ``data`` names where the token ``rows`` int64 [n, pos], which the pages were measured on, come from.
    """
    about = {"creatorId": source.creator, "createdAt": source.created}
    set_name = source.source.partition("-")[2] or source.source
    lines: dict[str, dict[str, Any]] = {
        "model": {
            "id": source.model,
            "displayName": source.model,
            "displayNameShort": source.model,
            "layers": config.n_layer,
            "neuronsPerLayer": config.mlp_width,
            "dimension": config.d_model,
            "owner": source.creator,
        },
        "sourceset": {
            "modelId": source.model,
            "name": set_name,
            "description": f"features at {source.site}",
            "creatorName": source.creator,
        },
        "source": {
            "id": source.source,
            "modelId": source.model,
            "setName": set_name,
            "num_prompts": rows.shape[0],
            "num_tokens_in_prompt": rows.shape[1],
            "dataset": data,
        },
    }
    for name, line in lines.items():
        path = Path(folder) / "v1" / source.model / source.source / f"{name}.jsonl"
        write_bytes(path, _line(line | about))


def batch_path(folder: str | Path, source: Source, kind: str, batch: int) -> Path:
    """Where a batch of ``kind`` lies below ``folder``."""
    return Path(folder) / "v1" / source.model / source.source / kind / f"batch-{batch}.jsonl.gz"


def read_batch(path: str | Path) -> list[dict[str, Any]]:
    """The objects of one batch file, ours or Neuronpedia's; the folder's name says what they must hold.

    Raises CheckpointError for a file that is not gzip, is cut short, unpacks to over 1 GiB, or whose lines
    lack a field, hold NaN, or repeat a key.
    """
    path = Path(path)
    required = REQUIRED.get(path.parent.name)
    if required is None:
        raise CheckpointError(f"{path} must lie in a folder called {', '.join(KINDS)}")
    try:
        with gzip.open(path) as file:
            raw = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"{path} cannot be read as gzip: {error}") from error
    if len(raw) > MAX_UNPACKED:
        raise CheckpointError(f"{path} unpacks to more than {MAX_UNPACKED} bytes")
    rows = []
    for number, line in enumerate(raw.splitlines(), start=1):
        row = parse_json(line, f"{path}, line {number}")
        for key, kind in required.items():
            wanted = (int, float) if kind is float else kind
            if not isinstance(row.get(key), wanted):
                raise CheckpointError(f"{path}, line {number}: {key!r} must be {kind.__name__}")
        if path.parent.name == "activations" and len(row["tokens"]) != len(row["values"]):
            raise CheckpointError(f"{path}, line {number}: tokens and values differ in number")
        rows.append(row)
    return rows


def _pack(rows: Iterable[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    # GzipFile and not gzip.compress, whose header names the operating system in some versions of Python.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=6, mtime=0) as file:
        for row in rows:
            file.write(_line(row))
    return buffer.getvalue()


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate of a token has no UTF-8


def _where(index: int, source: Source) -> dict[str, Any]:
    return {
        "modelId": source.model,
        "layer": source.source,
        "index": str(index),
        "creatorId": source.creator,
        "createdAt": source.created,
    }


def _feature(page: Page, source: Source, text: Callable[[int], str]) -> dict[str, Any]:
    return _where(page.index, source) | {
        "maxActApprox": page.max_value,
        "hasVector": True,
        "vector": list(page.direction),
        "vectorDefaultSteerStrength": page.max_value,
        "hookName": hook_name(source.site),
        "frac_nonzero": page.frac_nonzero,
        "freq_hist_data_bar_heights": list(page.values.heights),
        "freq_hist_data_bar_values": list(page.values.middles),
        "pos_str": [text(t) for t, _ in page.positive],
        "pos_values": [v for _, v in page.positive],
        "neg_str": [text(t) for t, _ in page.negative],
        "neg_values": [v for _, v in page.negative],
        "logits_hist_data_bar_heights": list(page.logits.heights),
        "logits_hist_data_bar_values": list(page.logits.middles),
    }


def _activations(page: Page, source: Source, text: Callable[[int], str]) -> Iterable[dict[str, Any]]:
    for context in page.contexts:
        most = max(context.values)
        yield _where(page.index, source) | {
            "id": "g" + digest_of([source.model, source.source, page.index, context.row])[:24],
            "tokens": [text(t) for t in context.tokens],
            "dataIndex": str(context.row),
            "maxValue": most,
            "maxValueTokenIndex": context.values.index(most),
            "minValue": min(context.values),
            "values": list(context.values),
        }


def _explanation(index: int, explanation: Explanation, source: Source) -> dict[str, Any]:
    where = _where(index, source)
    author = where.pop("creatorId")
    return where | {
        "id": "g" + digest_of([source.model, source.source, index, explanation.description])[:24],
        "authorId": author,
        "description": explanation.description,
        "typeName": explanation.kind,
        "explanationModelName": explanation.model,
        "scores": [{"explanationScoreTypeName": name, "value": value} for name, value in explanation.scores],
    }
