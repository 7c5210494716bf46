"""What a circuit is worth: against definitions written out, scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import auc, roc_auc_score

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits import (
    FRACTIONS,
    Circuit,
    Patcher,
    completeness,
    divergence,
    faithfulness,
    mib_curve,
    minimality,
    planted_transformer,
    pooled,
    random_circuits,
    recovered,
    score_edges,
)
from glasshouse.interp.circuits.curve import area
from interp.circuits.byhand import CONFIGS, contrast, noisy


@pytest.fixture(scope="module")
def patcher() -> Patcher:
    model = noisy(**CONFIGS["llama"])
    return Patcher(model, contrast(model, n=6))


def mean(patcher: Patcher, kept: np.ndarray) -> float:
    return float(patcher.measure(kept)[0].double().mean())


def share(patcher: Patcher, kept: np.ndarray) -> float:
    """f of the definition."""
    full, none = np.ones_like(kept), np.zeros_like(kept)
    m0 = mean(patcher, none)
    return (mean(patcher, kept) - m0) / (mean(patcher, full) - m0)


def test_areas_are_those_of_scikit_learns_trapezoids():
    f = np.random.default_rng(0).normal(size=10)
    assert area(f) == pytest.approx(auc(FRACTIONS, f))
    assert area(np.ones(10)) == pytest.approx(0.999)


def test_cpr_and_cmd_are_those_of_the_benchmarks_definition(patcher):
    scores = score_edges(patcher, "eap")
    curve = mib_curve(patcher, scores, random=2)
    for absolute, found in ((True, curve.by_size), (False, curve.signed)):
        wanted = []
        for p in FRACTIONS:
            kept = patcher.graph.prune(patcher.graph.top(scores.values, int(p * 110), absolute=absolute))
            wanted.append(share(patcher, kept))
        assert np.allclose(found, wanted, atol=1e-5)
    assert len(patcher.graph.edges) == 110
    assert curve.cpr.value == pytest.approx(auc(FRACTIONS, curve.signed))
    assert curve.cmd.value == pytest.approx(auc(FRACTIONS, np.abs(1 - np.array(curve.by_size))))
    assert curve.signed[-1] == pytest.approx(1.0) and curve.sizes[-1] == 110
    assert curve.cpr.low <= curve.cpr.value <= curve.cpr.high and curve.cpr.n == 6 and curve.random_cpr.n == 2
    assert "<svg" in curve._repr_html_() and "ablation corrupt" in str(curve)


def test_a_known_circuit_is_ranked_better_than_by_chance():
    planted = planted_transformer(200)
    patcher = Patcher(planted.model, planted.contrast(12))
    curve = mib_curve(patcher, score_edges(patcher, "exact"), random=10)
    assert curve.cpr.value > curve.random_cpr.high and curve.cmd.value < curve.random_cmd.low


def test_faithfulness_is_the_definition_and_stands_beside_random_circuits(patcher):
    circuit = score_edges(patcher, "exact").circuit(40)
    result = faithfulness(patcher, circuit, random=8)
    assert result.recovered.value == pytest.approx(share(patcher, circuit.kept), abs=1e-5)
    assert result.left.value == pytest.approx(share(patcher, ~circuit.kept), abs=1e-5)
    drawn = random_circuits(patcher.graph, 40, 8)
    assert (drawn.sum(1) == 40).all() and len(np.unique(drawn, axis=0)) == 8
    others = [share(patcher, kept) for kept in drawn]
    assert result.random.value == pytest.approx(np.mean(others), abs=1e-5)
    assert result.beaten.value == np.mean(np.array(others) < result.recovered.value)
    assert (result.recovered.n, result.random.n, result.size, result.edges) == (6, 8, 40, 110)
    assert "ablation corrupt" in str(result) and "<table" in result._repr_html_()


def test_the_divergence_is_that_of_the_two_predictions(patcher):
    kept = score_edges(patcher, "exact").circuit(40).kept
    keep = torch.from_numpy(patcher.graph.matrix(np.stack([np.ones_like(kept), kept])))
    with torch.no_grad():
        logits = patcher.logits(keep)[:, 0].double()  # every position shows the one that is read
        whole, part = logits.log_softmax(-1).split(6)
    assert torch.allclose(divergence(patcher, kept), (whole.exp() * (whole - part)).sum(-1), atol=1e-6)
    assert float(divergence(patcher, np.ones_like(kept)).max()) == 0


def test_completeness_cuts_the_same_parts_from_circuit_and_model(patcher):
    circuit = score_edges(patcher, "exact").circuit(40)
    result = completeness(patcher, circuit, parts=6)
    assert result.gap.n == 6 and result.worst >= result.gap.value > 0
    everything = Circuit(patcher.graph, circuit.scores, np.ones_like(circuit.kept), circuit.about)
    assert completeness(patcher, everything, parts=4).worst == 0  # nothing is outside
    with pytest.raises(UsageError, match="one part or more"):
        completeness(patcher, circuit, parts=0)


def test_minimality_finds_the_edge_that_nobody_needs(patcher):
    scores = score_edges(patcher, "exact")
    kept = scores.circuit(20, greedy=True).kept.copy()
    lonely = patcher.graph.find(["input->a1.h3<q>"])[0]
    kept[lonely] = True
    kept[patcher.graph.pairs[:, 0] == patcher.graph.writers.index("a1.h3")] = False  # it leads nowhere
    circuit = Circuit(patcher.graph, scores.values, kept, scores.about)
    result = minimality(patcher, circuit, parts=2)
    assert result.effects["input->a1.h3<q>"] < 1e-5
    one = patcher.graph.number[circuit.edges[0]]
    alone = kept.copy()
    alone[one] = False
    effect = abs(share(patcher, kept) - share(patcher, alone))
    assert result.effects[circuit.edges[0]] >= effect - 1e-5
    above = sum(e > result.tolerance for e in result.effects.values())
    assert result.needed.value == above / len(circuit) and result.needed.n == len(circuit) == len(
        result.effects
    )
    with pytest.raises(UsageError, match="empty"):
        minimality(patcher, Circuit(patcher.graph, scores.values, np.zeros_like(kept), scores.about))


def test_auroc_is_scikit_learns_and_agreement_is_scipys(patcher):
    exact, fast = score_edges(patcher, "exact"), score_edges(patcher, "eap")
    known = exact.circuit(15).edges
    labels = exact.circuit(15).kept
    assert fast.auroc(known).value == pytest.approx(roc_auc_score(labels, np.abs(fast.values)))
    among = [e for i, e in enumerate(exact.graph.edges) if i % 2 or labels[i]]
    chosen = exact.graph.find(among)
    wanted = roc_auc_score(labels[chosen], np.abs(fast.values[chosen]))
    assert fast.auroc(known, among).value == pytest.approx(wanted)
    assert exact.auroc(known).value == 1.0
    assert fast.agreement(exact) == pytest.approx(spearmanr(np.abs(fast.values), np.abs(exact.values))[0])


def test_agreement_of_tied_scores_is_scipys(patcher):
    from dataclasses import replace

    exact = score_edges(patcher, "exact")
    coarse = replace(exact, values=np.round(exact.values, 1))
    assert coarse.agreement(exact) == pytest.approx(spearmanr(np.abs(coarse.values), np.abs(exact.values))[0])
    with pytest.raises(UsageError, match="no ranks"):
        replace(exact, values=np.zeros_like(exact.values)).agreement(exact)


def test_pooled_scores_are_those_of_all_rows_together():
    model = noisy()
    data = contrast(model, n=6)
    parts = [data.rows(torch.arange(2)), data.rows(torch.arange(2, 6))]
    for method in ("exact", "eap"):
        whole = score_edges(Patcher(model, data), method)
        joined = pooled([score_edges(Patcher(model, part), method) for part in parts])
        assert np.allclose(joined.values, whole.values, atol=1e-5) and joined.about.n == 6
    other = score_edges(Patcher(model, data, "zero"), "eap")
    with pytest.raises(UsageError, match="one ablation"):
        pooled([joined, other])
    with pytest.raises(UsageError, match="nothing"):
        pooled([])


def test_what_a_whole_and_an_empty_set_recover_is_one_and_nothing(patcher):
    n = len(patcher.graph.edges)
    assert np.allclose(
        recovered(patcher, np.stack([np.ones(n), np.zeros(n)]).astype(bool)), [1, 0], atol=1e-6
    )


def test_a_circuit_without_edges_is_not_measured(patcher):
    scores = score_edges(patcher, "eap")
    with pytest.raises(UsageError, match="no edges"):
        faithfulness(patcher, Circuit(patcher.graph, scores.values, np.zeros(110, dtype=bool), scores.about))
