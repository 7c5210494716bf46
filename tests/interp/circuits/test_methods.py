"""Fast methods against what they approximate, and the greedy one against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits import METHODS, Patcher, attribution, score_edges
from glasshouse.interp.circuits.acdc import prune_greedily
from glasshouse.interp.circuits.attribution import eap, eap_ig
from glasshouse.interp.circuits.exact import edge_effects
from glasshouse.interp.circuits.masks import open_chance, optimise_masks
from interp.circuits.byhand import CONFIGS, contrast, noisy

ALL = pytest.mark.parametrize("features", CONFIGS.values(), ids=CONFIGS.keys())


def effects(patcher: Patcher) -> np.ndarray:
    return (patcher.clean - edge_effects(patcher)).double().mean(1).numpy()


@ALL
def test_eap_is_the_exact_effect_of_a_small_change(features):
    """Both are pushed to the same limit: the difference falls with the size of the change."""
    patcher = Patcher(noisy(**features).double(), contrast(noisy(**features)))
    gap = patcher.alternative - patcher.live
    errors = []
    for size in (1e-2, 1e-3):
        patcher.alternative = patcher.live + size * gap
        exact = (patcher.clean.double() - double_effects(patcher)).mean(1).numpy() / size
        found = eap(patcher) / size
        errors.append(np.abs(found - exact).max() / np.abs(exact).max())
    assert errors[1] < max(0.2 * errors[0], 1e-3) and errors[1] < 5e-3


def double_effects(patcher: Patcher) -> torch.Tensor:
    """`edge_effects` in float64: one pass with a full mask for each edge."""
    n = len(patcher.graph.edges)
    keep = torch.from_numpy(patcher.graph.matrix(~np.eye(n, dtype=bool))).double()
    with torch.no_grad():
        return torch.cat([patcher.metric(k) for k in keep.split(16)])


@pytest.mark.parametrize("along", ["inputs", "activations"])
def test_integrated_gradients_converge_and_are_exact_where_everything_is_linear(along):
    model = noisy()
    patcher = Patcher(model, contrast(model))
    fine = eap_ig(patcher, 64, along)
    errors = [np.abs(eap_ig(patcher, n, along) - fine).max() / np.abs(fine).max() for n in (2, 16)]
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.02
    # Without norms, with a linear metric, edges into the logits act linearly: all three agree.
    flat = noisy(norm="none")
    patcher = Patcher(flat, contrast(flat))
    last = [i for i, e in enumerate(patcher.graph.edges) if e.endswith("->logits")]
    exact = effects(patcher)[last]
    assert np.allclose(eap(patcher)[last], exact, atol=1e-4)
    assert np.allclose(eap_ig(patcher, 3, along)[last], exact, atol=1e-4)


def test_the_path_of_one_nodes_activation_adds_up_to_the_effect_of_cutting_all_its_edges():
    """Completeness of integrated gradients (Sundararajan et al. 2017): sums are exact for any way."""
    model = noisy(**CONFIGS["llama"])
    patcher = Patcher(model, contrast(model))
    graph = patcher.graph
    scores = eap_ig(patcher, 64, "activations")
    for w, name in enumerate(graph.writers):
        own = graph.pairs[:, 0] == w
        kept = np.ones((1, len(own)), dtype=bool)
        kept[0, own] = False
        wanted = float((patcher.clean - patcher.measure(kept)[0]).mean())
        assert scores[own].sum() == pytest.approx(wanted, abs=2e-3), name


def test_rows_in_parts_give_the_same_scores(monkeypatch):
    model = noisy(**CONFIGS["gpt2"])
    patcher = Patcher(model, contrast(model, n=6))
    whole = [eap(patcher), eap_ig(patcher, 3), eap_ig(patcher, 3, "activations")]
    monkeypatch.setattr(attribution, "NUMBERS_AT_ONCE", 8_000)
    parts = [eap(patcher), eap_ig(patcher, 3), eap_ig(patcher, 3, "activations")]
    assert len(attribution._chunks(patcher, 1)) > 1
    for a, b in zip(whole, parts, strict=True):
        assert np.allclose(a, b, atol=1e-6)


def test_sets_in_parts_give_the_same_measurements():
    model = noisy()
    data = contrast(model)
    sets = np.random.default_rng(0).random((9, len(Patcher(model, data).graph.edges))) < 0.7
    small = Patcher(model, data, sets_at_once=2)
    assert torch.allclose(small.measure(sets), Patcher(model, data).measure(sets), atol=1e-6)


@pytest.mark.parametrize("threshold", [0.003, 0.05])
def test_batched_greedy_pruning_is_the_sequential_algorithm_edge_for_edge(threshold):
    model = noisy()
    patcher = Patcher(model, contrast(model))
    graph = patcher.graph
    kept = np.ones(len(graph.edges), dtype=bool)
    current = float(patcher.clean.double().mean())
    for edge in sorted(range(len(kept)), key=lambda i: (-graph.pairs[i, 1], -graph.pairs[i, 0])):
        kept[edge] = False
        value = float(patcher.measure(kept).double().mean())
        if (current - value) / patcher.gap >= threshold:
            kept[edge] = True
        else:
            current = value
    found, cost = prune_greedily(patcher, threshold)
    assert 0 < kept.sum() < len(kept)
    assert (found == kept).all()
    assert ((cost >= threshold) == kept).all()
    with pytest.raises(UsageError, match="must be positive"):
        prune_greedily(patcher, 0.0)


def test_the_chance_that_a_hard_concrete_gate_is_open_is_how_often_it_is():
    from glasshouse.interp.circuits.masks import _drawn

    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    drawn = _drawn(logits, 20_000, "hard-concrete", torch.Generator().manual_seed(0))
    often = (drawn > 0).float().mean(0)
    assert torch.allclose(often, open_chance(logits, "hard-concrete"), atol=0.015)


def test_gates_of_a_node_are_shared_by_its_edges_and_training_repeats():
    model = noisy(n_layer=1)
    patcher = Patcher(model, contrast(model))
    scores = optimise_masks(patcher, level="node", steps=5)
    for w in range(len(patcher.graph.writers)):
        assert len(set(scores[patcher.graph.pairs[:, 0] == w])) == 1
    assert (scores == optimise_masks(patcher, level="node", steps=5)).all()
    assert (optimise_masks(patcher, steps=5, seed=1) != optimise_masks(patcher, steps=5)).any()
    assert all(p.grad is None for p in model.parameters())


def test_choices_that_do_not_exist_are_refused():
    model = noisy(n_layer=1)
    patcher = Patcher(model, contrast(model))
    with pytest.raises(UsageError, match=r"no method 'eap_ig'. Did you mean 'eap-ig'"):
        score_edges(patcher, "eap_ig")
    with pytest.raises(UsageError, match="eap: .*unexpected keyword argument 'steps'"):
        score_edges(patcher, "eap", steps=3)
    with pytest.raises(UsageError, match="one step or more"):
        score_edges(patcher, "eap-ig", steps=0)
    with pytest.raises(UsageError, match=r"no choice 'sigmod'. Did you mean 'sigmoid'"):
        score_edges(patcher, "masks", gate="sigmod")
    with pytest.raises(UsageError, match="no way along 'outputs'"):
        eap_ig(patcher, 3, "outputs")  # type: ignore[arg-type]


def test_every_score_says_what_it_was_measured_on():
    model = noisy(n_layer=1)
    data = contrast(model, n=4)
    patcher = Patcher(model, data, "zero")
    for method in METHODS:
        about = score_edges(patcher, method, **({"steps": 2} if method == "masks" else {})).about
        assert (about.method, about.ablation, about.metric, about.n) == (method, "zero", "LogitDifference", 4)
        assert about.model == patcher.model_digest and about.data == patcher.data_digest
        assert about.seconds > 0 and method in str(about) and "ablation zero" in str(about)
    other = Patcher(model, data.rows(torch.tensor([0, 1])), "zero")
    assert other.data_digest != patcher.data_digest
    assert score_edges(other, "eap").about.metric == "LogitDifference"
