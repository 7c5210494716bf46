from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.train.schedule import warmup_stable_decay

SHAPE = {"warmup_share": 0.1, "decay_share": 0.4}


def test_rises_stays_and_falls_linearly() -> None:
    factors = [warmup_stable_decay(step, 20, **SHAPE) for step in range(20)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:13] == [1.0] * 11
    assert factors[12:] == pytest.approx([1 - i / 8 for i in range(8)])


def test_falls_to_the_share_asked_for() -> None:
    assert warmup_stable_decay(99, 100, warmup_share=0, decay_share=1, final_share=0.5) == pytest.approx(
        0.505
    )


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1))
def test_every_factor_is_positive_and_at_most_one(
    steps: int, warmup: float, decay: float, final: float
) -> None:
    shape = {"warmup_share": warmup, "decay_share": decay, "final_share": final}
    assert all(0 < warmup_stable_decay(step, steps, **shape) <= 1 for step in range(steps))


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_the_stage_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        warmup_stable_decay(step, 20, **SHAPE)


def test_a_cosine_starts_and_ends_where_the_line_does_and_is_half_way_at_half_time() -> None:
    shape = {"warmup_share": 0.0, "decay_share": 1.0, "final_share": 0.1, "shape": "cosine"}
    factors = [warmup_stable_decay(step, 10, **shape) for step in range(10)]
    assert factors[0] == pytest.approx(1.0)
    assert factors[5] == pytest.approx(0.55)
    assert factors == sorted(factors, reverse=True)
    assert factors[1] > 0.95 and factors[9] < 0.13  # flat at both ends
