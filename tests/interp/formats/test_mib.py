"""Circuit files hold exactly the edges a model has, and nothing that is not a number."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.circuits.circuit import About, Circuit
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.formats.mib import CircuitFile, ScoredEdge, Shape, read_circuit, write_circuit
from glasshouse.model import GPT, GPTConfig

GPT2 = Shape(12, 12, 768)
SMALL = Shape(2, 2, 8)


def enumerated(shape: Shape) -> set[str]:
    """Every edge, written down from the definition and not from the code under test.

    A node's time is when it writes; an input of a node sees all that were written before it is read.
    """
    writers = {"input": 0}
    readers = {}
    for layer in range(shape.n_layer):
        for head in range(shape.n_head):
            writers[f"a{layer}.h{head}"] = 10 * layer + 3
            for port in "qkv":
                readers[f"a{layer}.h{head}<{port}>"] = 10 * layer + 1
        writers[f"m{layer}"] = 10 * layer + 7
        readers[f"m{layer}"] = 10 * layer + (1 if shape.parallel else 5)
    readers["logits"] = 10**6
    return {
        f"{source}->{target}"
        for (source, wrote), (target, read) in itertools.product(writers.items(), readers.items())
        if wrote < read
    }


def test_gpt2_small_has_158_nodes_and_32491_edges():
    names = enumerated(GPT2)
    assert GPT2.n_nodes == len(list(GPT2.nodes())) == 158
    assert GPT2.n_edges == len(names) == 32_491
    for name in names:
        GPT2.check_edge(name)


@given(st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_name_is_accepted_exactly_when_the_model_has_the_edge(layers, heads, parallel):
    shape = Shape(layers, heads, 8, parallel)
    nodes = list(shape.nodes())
    assert len(nodes) == shape.n_nodes
    targets = nodes + [f"{n}<{p}>" for n in nodes for p in "qkv"]
    accepted = set()
    for source, target in itertools.product(nodes, targets):
        try:
            shape.check_edge(f"{source}->{target}")
        except UsageError:
            continue
        accepted.add(f"{source}->{target}")
    assert accepted == enumerated(shape)
    assert len(accepted) == shape.n_edges


@given(st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_edges_that_circuits_are_found_over_are_those_of_the_files(layers, heads, parallel):
    graph, shape = Graph(layers, heads, 8, parallel), Shape(layers, heads, 8, parallel)
    assert set(graph.edges) == enumerated(shape) and set(graph.nodes) == set(shape.nodes())


def test_a_found_circuit_is_saved_as_a_file_that_is_read_here_and_back(tmp_path):
    made = GPT(GPTConfig(vocab_size=9, context=4, d_model=8, n_layer=2, n_head=2)).init_weights(0)
    about = About("by hand", "zero", "none", 0, "ab", "cd")
    found = Circuit.of(made, ["input->m0", "m0->logits"], about)
    found.save(tmp_path / "ours.json")
    read = read_circuit(tmp_path / "ours.json", Shape.of(made.config))
    assert read.complete and read.inside == set(found.edges) and read.facts["ablation"] == "zero"
    write_circuit(tmp_path / "again.json", read)
    again = Circuit.load(tmp_path / "again.json")
    assert again.edges == found.edges and again.about == found.about and again.graph == found.graph


@pytest.mark.parametrize(
    "name",
    [
        "", "input", "input->a2.h0<q>", "input->a0.h2<q>", "input->a0.h0", "input->m0<q>", "m0->m0", "m1->m0",
        "a0.h0->a0.h1<q>", "logits->m0", "m0->input", "input->a00.h0<q>", "input->a0.h01<q>",
        "input->a0.h0<x>", "input->m0 ", "input->m0\n", "a0.h0->m0->m1", "input->m٣",
    ],
)  # fmt: skip
def test_names_that_are_no_edges_are_refused(name):
    with pytest.raises(UsageError):
        SMALL.check_edge(name)


@st.composite
def circuits(draw: st.DrawFn) -> CircuitFile:
    shape = Shape(draw(st.integers(1, 2)), draw(st.integers(1, 2)), 4, draw(st.booleans()))
    score = st.floats(allow_nan=False, allow_infinity=False)
    edge = st.builds(ScoredEdge, score, st.booleans())
    edges = draw(st.dictionaries(st.sampled_from(sorted(enumerated(shape))), edge))
    nodes = draw(st.just({}) | st.dictionaries(st.sampled_from([*shape.nodes()][:-1]), st.booleans()))
    return CircuitFile(shape, edges, nodes, {"ablation": "mean", "n": 64})


@given(circuits())
def test_any_circuit_comes_back_as_it_was(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("c") / "c.json"
    write_circuit(path, circuit)
    back = read_circuit(path, circuit.shape)
    assert back == circuit and back.inside == circuit.inside
    assert json.loads(path.read_text("utf-8")).keys() >= {"cfg", "nodes", "edges"}


def test_a_file_of_all_edges_is_complete_and_nodes_follow_from_its_edges(tmp_path):
    edges = {name: ScoredEdge(0.5, name in ("input->m0", "m0->logits")) for name in enumerated(SMALL)}
    circuit = CircuitFile(SMALL, edges)
    assert circuit.complete
    assert {n for n, inside in circuit.nodes.items() if inside} == {"input", "m0", "logits"}
    assert circuit.inside == {"input->m0", "m0->logits"}


def test_an_edge_of_a_node_outside_the_circuit_is_not_inside():
    edges = {"input->m0": ScoredEdge(1.0, True), "m0->logits": ScoredEdge(1.0, True)}
    assert CircuitFile(SMALL, edges, {"input": True}).inside == frozenset()


def test_parallel_models_have_no_edge_from_a_head_to_the_mlp_beside_it():
    config = GPTConfig(vocab_size=9, context=4, d_model=8, n_layer=1, n_head=2, parallel=True)
    with pytest.raises(UsageError, match="reads before"):
        Shape.of(config).check_edge("a0.h0->m0")


DATA = {
    "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {"input": {"in_graph": True}, "logits": {"in_graph": True}},
    "edges": {"input->logits": {"score": 0.25, "in_graph": True}},
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("cfg",), None, "'cfg' is missing"),
        (("cfg", "n_layers"), True, "'n_layers' must be int"),
        (("cfg", "n_layers"), 10**9, "'n_layers' is 1000000000"),
        (("cfg", "parallel_attn_mlp"), 1, "'parallel_attn_mlp' must be bool"),
        (("edges",), [], "'edges' is missing or not an object"),
        (("edges", "input->m7"), {"score": 0.0, "in_graph": False}, "no node 'm7'"),
        (("edges", "input->logits"), {"score": 0.0}, "needs 'score' and 'in_graph'"),
        (("edges", "input->logits"), {"score": "1", "in_graph": True}, "must be a number"),
        (("edges", "input->logits"), {"score": 1.0, "in_graph": 1}, "true or false"),
        (("nodes", "input"), {"in_graph": True, "neurons": [True]}, "selects neurons"),
        (("nodes", "m9"), {"in_graph": True}, "no node 'm9'"),
        (("glasshouse",), 3, "must be an object"),
    ],
)
def test_a_damaged_circuit_file_is_refused(tmp_path, key, value, message):
    data = json.loads(json.dumps(DATA))
    part = data
    for step in key[:-1]:
        part = part[step]
    part[key[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_circuit(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25", "NaN", "NaN is not JSON"),
        ("0.25", "1e999", "the score is inf"),
        ('"edges": {', '"edges": {"input->logits": {"score": 1, "in_graph": false}, ', "appears twice"),
        ('{"cfg"', '{"cfg', "not valid"),
    ],
)
def test_json_that_readers_would_read_differently_is_refused(tmp_path, old, new, message):
    (tmp_path / "c.json").write_text(json.dumps(DATA).replace(old, new), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_circuit(tmp_path / "c.json")


def test_a_circuit_of_another_model_is_refused(tmp_path):
    write_circuit(tmp_path / "c.json", CircuitFile(SMALL, {}))
    with pytest.raises(CheckpointError, match="is a circuit of .*, not of"):
        read_circuit(tmp_path / "c.json", GPT2)


def test_scores_that_are_no_numbers_are_never_written():
    with pytest.raises(UsageError, match="the score is nan"):
        CircuitFile(SMALL, {"input->m0": ScoredEdge(math.nan, False)})
