"""A cover covers what it says: every count against brute force, every share against simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.verify.search.cover import GAPS, Coverage, Dealer, deal, expected_pairs, requests_for
from verify.search.programmed import has, hunt, turned_by

ROWS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 9)),
        max_size=5,
        unique_by=(lambda r: r[0], lambda r: r[1]),
    ),
    max_size=12,
)


@given(ROWS, ROWS)
def test_counts_are_those_of_brute_force(
    first: list[list[tuple[int, int]]], second: list[list[tuple[int, int]]]
) -> None:
    seen = Coverage(10)
    seen.add(first)
    seen.add(second)
    rows = [*first, *second]
    words = {w for row in rows for _, w in row}
    places = {(w, g) for row in rows for g, w in row if g < GAPS}
    pairs = {frozenset(p) for row in rows for p in combinations({w for _, w in row}, 2)}
    assert seen.shares() == {
        "words": pytest.approx(len(words) / 10),
        "positions": pytest.approx(len(places) / (10 * GAPS)),
        "pairs": pytest.approx(len(pairs) / 45),
    }


def test_pairs_tested_alone_count_once_and_for_both_orders() -> None:
    seen = Coverage(4)
    seen.add_pairs([0, 1], [1, 0])
    assert seen.shares()["pairs"] == pytest.approx(1 / 6)
    assert seen.pairs[0, 1] == seen.pairs[1, 0] == 2


@pytest.mark.parametrize(("n", "k", "requests"), [(30, 4, 40), (60, 8, 50), (25, 2, 200), (40, 6, 1)])
def test_the_closed_form_is_the_mean_of_simulated_covers(n: int, k: int, requests: int) -> None:
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        seen = Coverage(n)
        seen.add([[(g, int(w)) for g, w in enumerate(rng.permutation(n)[:k])] for _ in range(requests)])
        shares.append(seen.shares()["pairs"])
    error = 4 * float(np.std(shares)) / np.sqrt(len(shares))
    assert np.mean(shares) == pytest.approx(expected_pairs(n, k, requests), abs=error + 1e-9)


@given(st.integers(5, 400), st.integers(2, 5), st.floats(0.05, 0.99))
@settings(max_examples=40)
def test_so_many_requests_reach_the_share_and_one_fewer_does_not(n: int, k: int, share: float) -> None:
    needed = requests_for(n, k, share)
    assert expected_pairs(n, k, needed) >= share - 1e-9
    assert needed == 1 or expected_pairs(n, k, needed - 1) < share + 1e-9


def test_every_word_comes_to_every_gap_before_any_comes_twice() -> None:
    dealer = Dealer(40, np.random.default_rng(1))
    for gap in (0, 3):
        assert sorted(dealer.next(gap, set()) for _ in range(40)) == list(range(40))  # type: ignore[type-var]


def test_a_request_holds_no_word_twice_and_what_is_dealt_is_what_is_counted() -> None:
    h = hunt(turned_by(has("zigzag")))
    prompts = h.refused("dense", 24)
    placed, rows = deal(
        h, prompts, h.found.candidates, 300, 6, Dealer(len(h.found.candidates), h.exam.rng("deal"))
    )
    for (prompt, fill), row in zip(placed, rows, strict=True):
        assert len({w for _, w in row}) == len(row) == len(fill) > 0
        assert {g: h.found.candidates[w] for g, w in row} == {g: w for g, (w,) in fill.items()}
        assert all(0 <= g <= len(prompt.words) for g in fill) and h.fits(prompt, fill)
