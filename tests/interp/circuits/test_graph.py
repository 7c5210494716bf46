"""The graph has MIB's nodes and edges, and sets of edges are chosen as MIB chooses them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits import Graph
from glasshouse.model import GPTConfig

GPT2 = Graph(12, 12, 768)


def test_gpt2_small_has_as_many_nodes_and_edges_as_mib_says():
    assert len(GPT2.nodes) == 158
    assert len(GPT2.edges) == 32_491


def test_edges_are_those_of_the_definition_written_out():
    graph = Graph(2, 2, 8)
    wanted = set()
    before = ["input"]
    for layer in range(2):
        heads = [f"a{layer}.h{h}" for h in range(2)]
        wanted |= {f"{w}->{h}<{p}>" for w in before for h in heads for p in "qkv"}
        wanted |= {f"{w}->m{layer}" for w in [*before, *heads]}
        before += [*heads, f"m{layer}"]
    wanted |= {f"{w}->logits" for w in before}
    assert set(graph.edges) == wanted and len(graph.edges) == len(wanted)


def test_a_parallel_block_has_no_edge_from_its_heads_to_its_mlp():
    graph = Graph(2, 2, 8, parallel=True)
    assert "a0.h0->m0" not in graph.number
    assert "a0.h0->m1" in graph.number and "m0->a1.h1<k>" in graph.number


def test_embeddings_can_be_two_nodes():
    graph = Graph(1, 1, 8, split_input=True)
    assert graph.nodes == ("embed", "pos_embed", "a0.h0", "m0", "logits")
    assert len(graph.edges) == 13  # as many as the compiled one-layer program has candidates


def test_shapes_that_edges_do_not_describe_are_refused():
    config = GPTConfig(vocab_size=5, context=4, d_model=8, n_layer=1, n_head=2, value_residual=True)
    with pytest.raises(UsageError, match="value_residual"):
        Graph.of(config)
    with pytest.raises(UsageError, match="learned positions"):
        Graph.of(config.model_copy(update={"value_residual": False}), split_input=True)


def test_an_edge_that_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(UsageError, match=r"no edge 'm3->m2'"):
        GPT2.find(["input->m0", "m3->m2"])
    with pytest.raises(UsageError, match=r"Did you mean 'input->a0.h1<q>'"):
        GPT2.find(["input->a0.h1<Q>"])
    assert GPT2.find([("input", "m0")]) == GPT2.find(["input->m0"])


def test_stages_say_when_readers_read_and_who_has_written_by_then():
    for graph in (Graph(3, 2, 8), Graph(3, 2, 8, parallel=True)):
        for w, r in graph.pairs:
            assert w < graph.written_at(graph.stage(r))
            assert graph.heard_from(w) <= graph.stage(r)
        for stage in {graph.stage(r) for r in range(len(graph.readers))}:
            first = graph.first_reader(stage)
            assert graph.stage(first) == stage and (first == 0 or graph.stage(first - 1) < stage)


def on_a_path(graph: Graph, kept: np.ndarray) -> set[str]:
    """Edges of walks from the embedding to the logits, found by walking."""
    names = [graph.edges[i].split("->") for i in np.flatnonzero(kept)]
    forward, backward = {"input"}, {"logits"}
    for _ in range(len(graph.nodes)):
        forward |= {r.partition("<")[0] for w, r in names if w in forward}
        backward |= {w for w, r in names if r.partition("<")[0] in backward}
    return {f"{w}->{r}" for w, r in names if w in forward and r.partition("<")[0] in backward}


@given(st.integers(0, 10**6), st.floats(0.05, 0.6))
def test_pruning_leaves_the_edges_on_walks_from_input_to_logits(seed, share):
    graph = Graph(2, 2, 8)
    kept = np.random.default_rng(seed).random(len(graph.edges)) < share
    assert {graph.edges[i] for i in np.flatnonzero(graph.prune(kept))} == on_a_path(graph, kept)


def test_greedy_takes_only_edges_that_lead_to_the_logits():
    graph = Graph(2, 2, 8)
    scores = np.random.default_rng(0).random(len(graph.edges))
    for n in (1, 5, 20, len(graph.edges)):
        kept = graph.greedy(scores, n)
        assert kept.sum() == n
        reached = {"logits"}
        for _ in graph.nodes:
            reached |= {
                w
                for w, r in (graph.edges[i].split("->") for i in np.flatnonzero(kept))
                if r.partition("<")[0] in reached
            }
        assert all(graph.edges[i].split("->")[1].partition("<")[0] in reached for i in np.flatnonzero(kept))
    best = max((s, e) for s, e in zip(scores, graph.edges, strict=True) if e.endswith("->logits"))[1]
    assert graph.greedy(scores, 1)[graph.number[best]]


def test_the_top_is_by_size_or_signed():
    graph = Graph(1, 1, 8)
    scores = np.zeros(len(graph.edges))
    scores[[2, 5, 6]] = [-3.0, 2.0, 1.0]
    assert np.flatnonzero(graph.top(scores, 2)).tolist() == [2, 5]
    assert np.flatnonzero(graph.top(scores, 2, absolute=False)).tolist() == [5, 6]
