"""Cutting edges gives what a pass by hand gives, for every kind of model and ablation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits import Ablation, Patcher
from glasshouse.interp.circuits.exact import edge_effects
from glasshouse.interp.metric import Contrast, Distance, LogitDifference
from interp.circuits import byhand
from interp.circuits.byhand import CONFIGS, contrast, noisy, twins

ALL = pytest.mark.parametrize("features", CONFIGS.values(), ids=CONFIGS.keys())


def random_sets(n_edges: int, count: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((count, n_edges)) < rng.uniform(0.2, 0.95, size=(count, 1))


@ALL
def test_with_no_edge_cut_the_logits_are_the_models_and_with_all_cut_the_corrupted_runs(features):
    model = noisy(**features)
    patcher = Patcher(model, contrast(model, "distance"))
    keep = torch.ones(2, *patcher.graph.valid.shape)
    keep[1] = 0
    with torch.no_grad():
        whole, cut = patcher.logits(keep).split(3)
        assert torch.allclose(whole, model(patcher.contrast.clean), atol=1e-5)
        assert torch.allclose(cut, model(patcher.contrast.corrupt), atol=1e-5)


@ALL
def test_any_edge_set_gives_the_logits_of_a_pass_by_hand(features):
    model = noisy(**features)
    patcher = Patcher(model, contrast(model, "distance"))
    graph = patcher.graph
    other = byhand.writers(model, graph, patcher.contrast.corrupt)
    sets = random_sets(len(graph.edges))
    found = patcher.measure(sets)
    for kept, metric in zip(sets, found, strict=True):
        names = {graph.edges[i] for i in np.flatnonzero(kept)}
        logits = byhand.logits(model, graph, patcher.contrast.clean, names, other)
        wanted = patcher.contrast.metric(logits, torch.arange(3))
        assert torch.allclose(metric, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["corrupt", "zero", "mean", "resample"])
@ALL
def test_exact_patching_equals_cutting_each_edge_in_a_full_pass(features, kind):
    model = noisy(**features)
    for metric in ("difference", "distance"):
        patcher = Patcher(model, contrast(model, metric), kind)
        alone = ~np.eye(len(patcher.graph.edges), dtype=bool)
        assert torch.allclose(edge_effects(patcher), patcher.measure(alone), rtol=1e-4, atol=1e-5)


def test_exact_patching_equals_a_pass_by_hand_for_each_edge():
    model = noisy(**CONFIGS["llama"])
    patcher = Patcher(model, contrast(model))
    graph, rows = patcher.graph, torch.arange(3)
    other = byhand.writers(model, graph, patcher.contrast.corrupt)
    effects = edge_effects(patcher)
    for i in range(0, len(graph.edges), 7):
        logits = byhand.logits(
            model, graph, patcher.contrast.clean, set(graph.edges) - {graph.edges[i]}, other
        )
        assert torch.allclose(effects[i], patcher.contrast.metric(logits, rows), atol=1e-5)


def alternatives(model, graph, data: Contrast) -> dict[str, dict[str, torch.Tensor]]:
    clean, corrupt = (byhand.writers(model, graph, rows) for rows in (data.clean, data.corrupt))
    mean = {k: torch.cat([clean[k], corrupt[k]]).mean(0, keepdim=True).expand_as(clean[k]) for k in clean}
    partner = Ablation("resample", seed=3).partners(len(data))
    return {
        "zero": {k: torch.zeros_like(v) for k, v in clean.items()},
        "mean": mean,
        "over": {k: v.mean(1, keepdim=True).expand_as(v) for k, v in mean.items()},
        "resample": {k: v[partner] for k, v in clean.items()},
    }


@pytest.mark.parametrize("split_input", [False, True])
def test_every_ablation_brings_what_it_says(split_input):
    model = noisy(**CONFIGS["gpt2"])
    data = contrast(model, "distance")
    given = {
        "zero": Ablation("zero"),
        "mean": Ablation("mean"),
        "over": Ablation("mean", over_positions=True),
        "resample": Ablation("resample", seed=3),
    }
    for name, ablation in given.items():
        patcher = Patcher(model, data, ablation, split_input=split_input)
        other = alternatives(model, patcher.graph, data)[name]
        kept = random_sets(len(patcher.graph.edges), 1)
        names = {patcher.graph.edges[i] for i in np.flatnonzero(kept[0])}
        logits = byhand.logits(model, patcher.graph, data.clean, names, other)
        wanted = data.metric(logits, torch.arange(3))
        assert torch.allclose(patcher.measure(kept)[0], wanted, rtol=1e-4, atol=1e-6), name


def test_reference_rows_can_be_others_than_the_datas():
    model = noisy()
    data, rows = contrast(model), torch.randint(17, (5, 9), generator=torch.Generator().manual_seed(5))
    mean = Patcher(model, data, Ablation("mean", reference=rows))
    wanted = byhand.writers(model, mean.graph, rows)["m0"].mean(0)
    assert torch.allclose(mean.alternative[mean.graph.writers.index("m0"), 0], wanted, atol=1e-5)
    drawn = Patcher(model, data, Ablation("resample", reference=rows))
    assert len(drawn.alternative[0]) == 3
    with pytest.raises(UsageError, match="9 positions or more"):
        Patcher(model, data, Ablation("mean", reference=rows[:, :4]))


def test_nobody_is_resampled_to_himself():
    for seed in range(20):
        partners = Ablation("resample", seed=seed).partners(7)
        assert sorted(partners.tolist()) == list(range(7))
        assert (partners != torch.arange(7)).all()


def test_positions_without_difference_and_beyond_the_metric_are_not_computed():
    model = noisy()
    clean, corrupt = twins()
    data = Contrast(
        clean, corrupt, LogitDifference(torch.arange(3), torch.arange(3) + 5, torch.tensor([7, 6, 7]))
    )
    patcher = Patcher(model, data)
    assert (patcher.past, patcher.end, patcher.length) == (4, 8, 4)
    assert Patcher(model, data, "zero").past == 0
    rows = torch.arange(3)
    with torch.no_grad():
        assert torch.allclose(patcher.clean, data.metric(model(clean), rows), atol=1e-5)
        assert torch.allclose(patcher.empty, data.metric(model(corrupt), rows), atol=1e-5)


def test_halves_of_a_contrast_measure_what_the_whole_measures():
    model = noisy()
    data = contrast(model, n=6)
    whole = Patcher(model, data)
    sets = random_sets(len(whole.graph.edges))
    even, odd = (Patcher(model, half) for half in data.halves())
    assert even.at is not None
    assert torch.allclose(even.measure(sets), whole.measure(sets)[:, ::2], atol=1e-5)
    assert torch.allclose(odd.measure(sets), whole.measure(sets)[:, 1::2], atol=1e-5)


def test_a_model_without_the_behaviour_is_refused():
    model = noisy()
    data = contrast(model)
    with pytest.raises(UsageError, match="rows are the same"):
        Patcher(model, Contrast(data.clean, data.clean, data.metric))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()  # nothing moves between positions
    flat = Contrast(
        data.clean,
        data.corrupt,
        LogitDifference(data.metric.right, data.metric.wrong, torch.tensor([6, 6, 6])),
    )
    with pytest.raises(UsageError, match="there is no behaviour"):
        Patcher(model, flat)


def test_rows_that_do_not_fit_the_model_are_refused():
    model = noisy()
    data = contrast(model)
    with pytest.raises(UsageError, match="vocabulary of 17"):
        Patcher(model, Contrast(data.clean + 9, data.corrupt, data.metric))
    long = data.clean.repeat(1, 2)
    with pytest.raises(UsageError, match="18 positions; this model reads 1 to 12"):
        Patcher(model, Contrast(long, long.flip(0), data.metric))
    with pytest.raises(UsageError, match=r"no ablation 'zeros'. Did you mean 'zero'"):
        Patcher(model, data, "zeros")
    with pytest.raises(UsageError, match="at least two"):
        Patcher(model, data.rows(torch.tensor([0])), "resample")


def test_activations_that_are_not_numbers_are_refused():
    model = noisy()
    data = contrast(model)
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="not all finite"):
        Patcher(model, data)


def test_edge_sets_of_another_size_are_refused():
    model = noisy()
    patcher = Patcher(model, contrast(model))
    with pytest.raises(UsageError, match="edges each; got 3"):
        patcher.measure(np.ones((1, 3), dtype=bool))


def test_metrics_of_whole_outputs_see_positions_that_were_not_computed():
    model = noisy()
    clean, corrupt = twins()
    with torch.no_grad():
        reference = model(corrupt)
    patcher = Patcher(model, Contrast(clean, corrupt, Distance(reference)))
    assert patcher.past == 4
    with torch.no_grad():
        wanted = Distance(reference)(model(clean), torch.arange(3))
    assert torch.allclose(patcher.clean, wanted, atol=1e-5)
