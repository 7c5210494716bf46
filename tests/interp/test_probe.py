"""Probes against scikit-learn, intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from glasshouse.base.errors import VerificationError
from glasshouse.interp.probe import auroc, control_labels, fit_logistic


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_auroc_equals_scikit_learn_ties_included(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    assume(labels.any() and not labels.all())
    found = auroc(scores, labels)
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high  # a handful of examples never gives certainty
    assert found.n == len(rows)


@pytest.mark.parametrize("shift", [0.0, 0.7, 1.5])
def test_its_interval_covers_the_truth_about_95_times_in_100(shift: float) -> None:
    from statistics import NormalDist

    truth = NormalDist().cdf(shift / np.sqrt(2))
    rng, labels = np.random.default_rng(5), np.arange(120) < 50
    covered = 0
    for _ in range(600):
        found = auroc(rng.standard_normal(120) + shift * labels, labels)
        covered += found.low <= truth <= found.high
    assert 0.92 < covered / 600 < 0.98


def test_perfect_separation_of_few_examples_is_not_certain() -> None:
    found = auroc(np.arange(10.0), np.arange(10) > 4)
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.5 < found.low < 0.6  # five of five
    mirrored = auroc(-np.arange(10.0), np.arange(10) > 4)
    assert (mirrored.value, mirrored.low) == (0.0, 0.0)
    assert mirrored.high == pytest.approx(1 - found.low)
    many = auroc(np.arange(1000.0), np.arange(1000) > 499)
    assert many.low > 0.99


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4])
def test_auroc_of_one_class_is_refused(labels: list[bool]) -> None:
    with pytest.raises(VerificationError, match="both classes"):
        auroc(np.arange(4.0), np.array(labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_auroc_of_scores_that_are_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(VerificationError, match="not finite"):
        auroc(np.array([0.0, bad]), np.array([True, False]))


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0, 100.0])
def test_logistic_regression_finds_scikit_learns_optimum(c: float) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((150, 12)) @ rng.standard_normal((12, 12)) + 3.0
    y = x[:, 0] + 2 * rng.standard_normal(150) > x[:, 1]
    mine = fit_logistic(x, y, c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(x, y)
    assert mine.weight == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert mine.bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert mine(x) == pytest.approx(theirs.decision_function(x), abs=2e-3)


@pytest.mark.parametrize("c", [0.1, 1.0, 1e4])
def test_separable_data_has_a_finite_optimum_which_is_found(c: float) -> None:
    rng = np.random.default_rng(2)
    y = np.arange(80) % 2 == 0
    x = rng.standard_normal((80, 5)) + np.where(y, 4.0, -4.0)[:, None]
    mine = fit_logistic(x, y, c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(x, y)
    assert mine.weight == pytest.approx(theirs.coef_[0], rel=1e-3, abs=1e-4)


def test_more_dimensions_than_examples_are_fitted_too() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((20, 64)), np.arange(20) < 7
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=20_000).fit(x, y)
    assert fit_logistic(x, y).weight == pytest.approx(theirs.coef_[0], abs=1e-4)


def test_one_class_or_activations_that_are_not_finite_cannot_be_fitted() -> None:
    x = np.ones((4, 2))
    with pytest.raises(VerificationError, match="both classes"):
        fit_logistic(x, np.ones(4, bool))
    with pytest.raises(VerificationError, match="NaN or infinity"):
        fit_logistic(x * np.nan, np.array([True, False, True, False]))


def test_control_labels_are_one_for_each_meaning_and_even() -> None:
    keys = [f"k{i % 37}" for i in range(500)]
    labels = control_labels(keys, np.random.default_rng(0))
    by_key = {k: {bool(v) for j, v in zip(keys, labels, strict=True) if j == k} for k in set(keys)}
    assert all(len(v) == 1 for v in by_key.values())
    assert sum(v == {True} for v in by_key.values()) in (18, 19)
    again = control_labels(keys, np.random.default_rng(0))
    other = control_labels(keys, np.random.default_rng(1))
    assert (labels == again).all() and (labels != other).any()
