from __future__ import annotations

import enum
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError

text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_reading_back_gives_the_same_value_and_the_same_bytes(value: Any) -> None:
    written = canonical_json(value)
    assert json.loads(written) == value
    assert canonical_json(json.loads(written)) == written


@given(st.dictionaries(text, values, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)
    assert digest_of(dict(items)) == digest_of(value)


@given(values)
def test_it_takes_one_line(value: Any) -> None:
    assert b"\n" not in canonical_json(value)
    assert b"\r" not in canonical_json(value)


def test_it_is_written_as_rfc_8785_says() -> None:
    value = {"b": [1, True, None, "é\n"], "a": {"z": 0.5, "": -3}, "\U0001f600": 1}
    assert canonical_json(value) == '{"a":{"":-3,"z":0.5},"b":[1,true,null,"é\\n"],"\U0001f600":1}'.encode()


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0.0, float("nan")]}, r"\$\.a\[1\]"),
        (float("inf"), r"\$"),
        ({"a": {1: 2}}, r"key 1 at \$\.a"),
        ({"x": {1, 2}}, r"set at \$\.x"),
        ({"x": b"bytes"}, r"bytes at \$\.x"),
        ({"x": np.int64(3)}, r"numpy\.int64 at \$\.x"),
        ([Colour.RED], r"Colour at \$\[0\]"),
        ({"x": "\ud800"}, r"surrogate"),
        ({"\ud800": 1}, r"surrogate"),
    ],
)
def test_what_is_ambiguous_is_refused_and_its_place_named(value: Any, where: str) -> None:
    with pytest.raises(UsageError, match=where):
        canonical_json(value)


def test_tuples_count_as_lists_and_int_differs_from_float() -> None:
    assert canonical_json((1, 2)) == canonical_json([1, 2])
    assert canonical_json(1) != canonical_json(1.0)
