"""One JSON text per value, so that equal values have equal digests.

After RFC 8785 (JSON Canonicalization Scheme): keys sorted, no spaces, UTF-8, shortest floats that
round-trip. Two deviations, both harmless because only this module writes what it later compares:
floats are spelled as Python's `repr` does (`1.0`, `1e-07`), and keys are sorted by code point, not by
UTF-16 unit. Integers of any size are allowed.
"""

from __future__ import annotations

import json
import math
from typing import Any

from glasshouse.base.errors import UsageError


def canonical_json(obj: Any) -> bytes:
    """Return the canonical UTF-8 JSON of `obj`.

    `obj` may hold None, bool, int, float, str, list, tuple and dict with str keys.
    Raises `UsageError`, naming the path inside `obj`, for NaN, infinities, keys that are not str,
    lone surrogates and any other type: a digest of something ambiguous would be worse than none.
    """
    _check(obj, "$")
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _check(obj: Any, path: str) -> None:
    if obj is None or isinstance(obj, int):
        return
    if isinstance(obj, str):
        _check_text(obj, path)
    elif isinstance(obj, float):
        if not math.isfinite(obj):
            raise UsageError(f"cannot write {obj} at {path} as canonical JSON: numbers must be finite")
    elif isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise UsageError(f"cannot write key {key!r} at {path} as canonical JSON: keys must be str")
            _check_text(key, path)
            _check(value, f"{path}.{key}")
    elif isinstance(obj, list | tuple):
        for index, value in enumerate(obj):
            _check(value, f"{path}[{index}]")
    else:
        kind = type(obj)
        raise UsageError(
            f"cannot write {kind.__module__}.{kind.__qualname__} at {path} as canonical JSON: "
            "convert it to None, bool, int, float, str, list or dict first"
        )


def _check_text(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"cannot write text at {path} as canonical JSON: lone surrogate at character {error.start}"
        ) from error
