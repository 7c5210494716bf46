"""Probes against scikit-learn, against planted truth, and against files that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.preprocessing import StandardScaler

from glasshouse.base.errors import CheckpointError, UsageError, VerificationError
from glasshouse.interp.probe import auroc
from glasshouse.interp.probes import Probe, ProbeConfig, fit_probe, load_probe
from glasshouse.interp.probes.core import STRENGTHS
from glasshouse.interp.probes.linear import ridge, scale_of
from glasshouse.interp.probes.rows import folds, grouped
from glasshouse.model.digest import weights_digest
from interp.dice import thrown
from interp.probes.toy import rows

X, Y, KEYS, UNIT = rows()


@pytest.mark.parametrize("scoring", ["log_loss", "accuracy", "auroc"])
def test_cross_validation_chooses_scikit_learns_penalty_and_finds_its_optimum(scoring: Any) -> None:
    mine = fit_probe(X, Y, ProbeConfig(scoring=scoring), groups=KEYS)
    parts = folds(Y, grouped(KEYS, len(Y)), 5)
    named = {"log_loss": "neg_log_loss", "accuracy": "accuracy", "auroc": "roc_auc"}[scoring]
    theirs = LogisticRegressionCV(
        Cs=list(STRENGTHS), cv=parts, scoring=named, tol=1e-10, max_iter=20_000, l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    scaler = StandardScaler().fit(X)
    theirs.fit(scaler.transform(X), Y)
    assert mine.strength == pytest.approx(float(theirs.C_))
    assert mine.score(X) == pytest.approx(theirs.decision_function(scaler.transform(X)), abs=2e-3)
    assert mine.probability(X) == pytest.approx(theirs.predict_proba(scaler.transform(X))[:, 1], abs=1e-3)


@pytest.mark.parametrize("shape", [(240, 12), (40, 90)])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_a_given_penalty_gives_scikit_learns_optimum_on_raw_activations(
    c: float, shape: tuple[int, int]
) -> None:
    x, y, _, _ = rows(*shape)
    mine = fit_probe(x, y, ProbeConfig(c=c, standardise=False))
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=50_000).fit(x, y)
    assert mine.weight == pytest.approx(theirs.coef_[0], abs=2e-4)
    assert mine.strength is None


@pytest.mark.parametrize("shape", [(240, 12), (40, 90)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 50.0])
def test_ridge_is_scikit_learns(alpha: float, shape: tuple[int, int]) -> None:
    x, y, _, _ = rows(*shape)
    theirs = (Ridge(alpha=alpha, solver="svd") if alpha else LinearRegression()).fit(
        x, np.where(y, 1.0, -1.0)
    )
    weight, bias = ridge(x, y, alpha)
    assert weight == pytest.approx(theirs.coef_, abs=1e-8)
    assert bias == pytest.approx(theirs.intercept_, abs=1e-7)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e9, 1e9))
def test_standardisation_is_scikit_learns_constant_columns_included(
    column: list[float], still: float
) -> None:
    x = np.column_stack([column, np.full(len(column), still)])
    mean, scale = scale_of(x)
    theirs = StandardScaler().fit(x)
    assert mean == pytest.approx(theirs.mean_, rel=1e-9, abs=1e-9)
    assert scale == pytest.approx(theirs.scale_, rel=1e-6)


def test_difference_of_means_points_from_one_mean_to_the_other() -> None:
    probe = fit_probe(X, Y, ProbeConfig(kind="mean_difference"))
    gap = X[Y].mean(0) - X[~Y].mean(0)
    assert probe.direction.numpy() == pytest.approx(gap / np.linalg.norm(gap), abs=1e-6)
    halfway = ((X[Y].mean(0) + X[~Y].mean(0)) / 2)[None]
    assert halfway @ probe.weight + probe.bias == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["ridge", "mean_difference", "logistic"])
def test_every_linear_probe_recovers_a_planted_direction(kind: Any) -> None:
    x, y, keys, unit = rows(n=2000, meanings=500, gap=3.0)
    probe = fit_probe(x, y, ProbeConfig(kind=kind), groups=keys)
    assert float(probe.direction @ torch.from_numpy(unit).float()) > 0.97


@pytest.mark.parametrize("kind", ["ridge", "mean_difference", "logistic", "mlp"])
def test_scores_of_every_kind_are_log_odds(kind: Any) -> None:
    x, y, _, _ = rows(n=1600, d=4, gap=1.0, meanings=1600)
    probe = fit_probe(x[:800], y[:800], ProbeConfig(kind=kind, hidden=8))
    p = probe.probability(x[800:])
    for low, high in ((0.1, 0.35), (0.35, 0.65), (0.65, 0.9)):
        here = (p > low) & (p < high)
        assert y[800:][here].mean() == pytest.approx(p[here].mean(), abs=0.12)


def test_an_mlp_learns_what_no_line_can() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((800, 6))
    y = (x[:, 0] > 0) ^ (x[:, 1] > 0)
    areas = {
        kind: auroc(fit_probe(x[:400], y[:400], ProbeConfig(kind=kind)).score(x[400:]), y[400:]).value  # type: ignore[arg-type]
        for kind in ("logistic", "mlp")
    }
    assert areas["logistic"] < 0.6 and areas["mlp"] > 0.9


def scattered(n: int, pos: int = 9, d: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positive rows have the concept at one random position that is read; padding holds it in all rows."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((n, pos, d)), np.arange(n) % 2 == 0
    mask = np.arange(pos) < rng.integers(3, pos + 1, n)[:, None]
    at = (rng.random(n) * mask.sum(1)).astype(int)
    x[np.arange(n), at, 0] += np.where(y, 4.0, 0.0)
    x[~mask] = 50.0
    return x, y, mask


def test_attention_finds_the_concept_wherever_it_stands_and_never_reads_padding() -> None:
    x, y, mask = scattered(600)
    probe = fit_probe(x[:300], y[:300], ProbeConfig(kind="attention", steps=400), mask=mask[:300])
    pooled = np.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdims=True)
    mean = fit_probe(pooled[:300], y[:300], ProbeConfig(c=1.0))
    found = auroc(probe.score(x[300:], mask[300:]), y[300:])
    assert found.low > auroc(mean.score(pooled[300:]), y[300:]).value
    assert found.value > 0.93
    other = np.where(mask[..., None], x, -7.0)
    assert (probe.score(other, mask) == probe.score(x, mask)).all()


@pytest.mark.parametrize("kind", ["ridge", "mean_difference", "logistic", "mlp", "attention"])
def test_a_saved_probe_scores_bit_for_bit_as_before(tmp_path: Path, kind: Any) -> None:
    x, y, mask = scattered(60)
    data, read = (x, mask) if kind == "attention" else (x[:, 0], None)
    probe = fit_probe(data, y, ProbeConfig(kind=kind, steps=5), mask=read, site="embed", model_digest="ab")
    again = load_probe(probe.save(tmp_path / "p"), site="embed", width=8)
    assert (again.score(data, read) == probe.score(data, read)).all()
    assert (again.config, again.site, again.model_digest) == (probe.config, "embed", "ab")
    assert again.strength == probe.strength


def test_equal_seeds_give_equal_probes_and_torch_numbers_stay_their_own() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():  # a caller's mode does not stop the fit
        a, b, c = (fit_probe(X, Y, ProbeConfig(kind="mlp", steps=20), seed=s).score(X) for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Probe]:
    model = thrown()
    x, y, _, _ = rows(d=16)
    probe = fit_probe(
        x, y, ProbeConfig(c=1.0), site="blocks.1.resid_post", model_digest=weights_digest(model)
    )
    return probe.save(tmp_path / "probe"), probe


def test_a_probe_is_refused_on_another_model_site_or_width(saved: tuple[Path, Probe]) -> None:
    folder, _ = saved
    assert load_probe(folder, model=thrown(), site="blocks.1.resid_post", width=16).width == 16
    with pytest.raises(CheckpointError, match="fitted on weights .* fit it again"):
        load_probe(folder, model=thrown(seed=1))
    with pytest.raises(CheckpointError, match="no site 'blocks.1.resid_post'. Did you mean"):
        load_probe(folder, model=thrown(n_layer=1))
    with pytest.raises(CheckpointError, match="fitted at site 'blocks.1.resid_post', not 'embed'"):
        load_probe(folder, site="embed")
    with pytest.raises(CheckpointError, match="reads width 16, not 12"):
        load_probe(folder, width=12)


def test_activations_of_another_width_are_refused_when_scored(saved: tuple[Path, Probe]) -> None:
    with pytest.raises(UsageError, match="12 wide, but this probe was fitted on width 16"):
        saved[1].score(X)


def test_damaged_files_are_refused(saved: tuple[Path, Probe]) -> None:
    folder, _ = saved
    whole, head = (folder / "probe.safetensors").read_bytes(), (folder / "probe.json").read_text()
    (folder / "probe.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load_probe(folder)
    (folder / "probe.safetensors").write_bytes(whole)
    for change in ({"width": 15}, {"format": "other"}, {"config": {"kind": "oracle"}}, {"width": "16"}):
        (folder / "probe.json").write_text(json.dumps(json.loads(head) | change))
        with pytest.raises(CheckpointError, match=r"shape|not a probe|oracle|positive integer"):
            load_probe(folder)
    (folder / "probe.json").write_text(head[:50])
    with pytest.raises(CheckpointError, match="not valid"):
        load_probe(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_probe(folder / "nowhere")


@pytest.mark.parametrize("kind", ["ridge", "mean_difference", "logistic", "mlp"])
def test_bad_rows_are_refused_with_what_is_wrong_with_them(kind: Any) -> None:
    config, holed = ProbeConfig(kind=kind), X.copy()
    holed[17, 3] = np.nan
    with pytest.raises(VerificationError, match="1 of 240 rows hold NaN or infinity, the first is row 17"):
        fit_probe(holed, Y, config)
    with pytest.raises(VerificationError, match="all 240 rows are of one class"):
        fit_probe(X, np.ones(240, bool), config)
    with pytest.raises(VerificationError, match="2 positive and 238 negative rows are too few"):
        fit_probe(X, np.arange(240) < 2, config)
    with pytest.raises(UsageError, match=r"expected \[240\]"):
        fit_probe(X, Y[:200], config)
    with pytest.raises(UsageError, match="true or false"):
        fit_probe(X, np.arange(240), config)
    with pytest.raises(UsageError, match=r"expected \[n, d\]"):
        fit_probe(X[:0], Y[:0], config)
    with pytest.raises(UsageError, match="one position of each row"):
        fit_probe(X[:, None], Y, config)
    with pytest.raises(UsageError, match="groups: expected 240"):
        fit_probe(X, Y, config, groups=["a"])


def test_bad_masks_and_directions_are_refused() -> None:
    x, y, mask = scattered(40)
    attention = ProbeConfig(kind="attention", steps=2)
    with pytest.raises(UsageError, match=r"takes activations \[n, pos, d\]"):
        fit_probe(x[:, 0], y, attention)
    with pytest.raises(UsageError, match="mask: expected"):
        fit_probe(x, y, attention, mask=mask[:, :3])
    with pytest.raises(UsageError, match="row 0 has no position left"):
        fit_probe(x, y, attention, mask=mask & False)
    with pytest.raises(UsageError, match="no single direction"):
        _ = fit_probe(x, y, attention, mask=mask).direction
    with pytest.raises(UsageError, match="mask is for the attention kind"):
        fit_probe(x[:, 0], y, mask=mask)


def test_torch_activations_of_any_float_type_are_taken() -> None:
    x = torch.from_numpy(X)
    wide = fit_probe(x.float(), torch.from_numpy(Y), ProbeConfig(c=1.0))
    narrow = fit_probe(x.bfloat16().requires_grad_(), torch.from_numpy(Y), ProbeConfig(c=1.0))
    assert wide.score(x) == pytest.approx(narrow.score(x), abs=0.2)
