from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError


def make(**changes: Any) -> Batch:
    fields: dict[str, Any] = {
        "tokens": np.zeros((2, 3), np.int64),
        "targets": np.zeros((2, 3), np.int64),
        "weight": np.ones((2, 3), np.float32),
        "shards": ("a",),
        "n_bytes": 6,
    }
    return Batch(**{**fields, **changes})


def test_a_batch_with_matching_arrays_is_accepted() -> None:
    assert make().tokens.shape == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": np.zeros((2, 4), np.int64)},
        {"weight": np.ones((2, 3), np.float64)},
        {"tokens": np.zeros((2, 3), np.int32)},
        {"tokens": np.zeros((0, 3), np.int64)},
        {"tokens": np.zeros(3, np.int64)},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="batch"):
        make(**changes)
