from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.rng import generator, seed_from


@given(st.lists(st.integers() | st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_a_seed_is_a_63_bit_number_and_a_function_of_its_parts(parts: list[int | str]) -> None:
    assert 0 <= seed_from(*parts) < 2**63
    assert seed_from(*parts) == seed_from(*parts)
    assert seed_from(*parts) != seed_from(*parts, 0)


def test_parts_do_not_run_together() -> None:
    assert len({seed_from("ab", "c"), seed_from("a", "bc"), seed_from("abc"), seed_from(["ab", "c"])}) == 4


def test_the_numbers_never_change() -> None:
    """Runs recorded in the past must give the same batches in every later version."""
    assert seed_from("data", 1, 2) == 267152696460068664
    assert generator("data", 1, 2).integers(0, 1000, 4).tolist() == [677, 674, 870, 666]
