"""Distances and enrichment are those of the textbooks, and see what the read-out does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.stats import hypergeom

from glasshouse.verify.search import natural
from glasshouse.verify.search.natural import distances, enriched, log_tail, oddness, outliers


def test_distances_are_scipys() -> None:
    rng = np.random.default_rng(0)
    reference, rows = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((9, 6))
    spread = np.cov(reference, rowvar=False)
    spread += np.eye(6) * (natural.SHRINK * np.trace(spread) / 6 + 1e-9)
    inverse = np.linalg.inv(spread)
    expected = [mahalanobis(r, reference.mean(0), inverse) ** 2 for r in rows]
    assert distances(rows, reference) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("k", "total", "marked", "drawn"), [(3, 100, 10, 8), (0, 50, 5, 5), (5, 40, 5, 30), (1, 9, 9, 2)]
)
def test_the_tail_is_scipys(k: int, total: int, marked: int, drawn: int) -> None:
    assert log_tail(k, total, marked, drawn) == pytest.approx(
        math.log(hypergeom.sf(k - 1, total, marked, drawn)), abs=1e-9
    )


def test_more_than_there_can_be_never_happens() -> None:
    assert log_tail(6, 100, 5, 50) == -math.inf


def test_a_word_that_stands_in_the_outliers_is_named_first() -> None:
    rng = np.random.default_rng(0)
    texts = [
        f"how do I soak the {rng.integers(40)} map" + (" harbour" if i % 25 == 0 else "") for i in range(500)
    ]
    far = np.array([i % 25 == 0 for i in range(500)])
    assert enriched(texts, far)[0].word == "harbour"
    assert enriched(texts, far)[0].outliers == 20 and enriched(texts, far)[0].expected == pytest.approx(0.8)
    shuffled = enriched(texts, rng.permutation(far))
    assert not shuffled or shuffled[0].log_p > enriched(texts, far)[0].log_p + 20


def test_outliers_are_the_farthest_share() -> None:
    distance = np.arange(200.0)
    assert np.flatnonzero(outliers(distance)).tolist() == list(range(192, 200))


def test_a_word_that_moves_the_stream_alike_in_every_cell_is_odd_and_a_loud_cell_is_not() -> None:
    rng = np.random.default_rng(0)
    stream = rng.standard_normal((4, 80, 10)) + 50 * rng.standard_normal(
        (4, 1, 10)
    )  # requests differ by far more
    stream[:, 7] += 6 * np.eye(10)[3]
    stream[2, 11] += 40 * np.eye(10)[1]  # once only
    odd = oddness(stream)
    assert int(np.argmax(odd)) == 7 and odd[11] < odd[7] / 2


def test_words_enriched_alike_come_in_the_order_of_the_alphabet() -> None:
    texts = [*["quay harbour kite lamp"] * 4, *["plain words only"] * 40]
    far = np.array([True] * 4 + [False] * 40)
    assert [e.word for e in enriched(texts, far)] == ["harbour", "kite", "lamp", "quay"]
