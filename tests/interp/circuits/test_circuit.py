"""A circuit is kept, read back, compared, shown, and refused where it does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.circuits import About, Circuit, Patcher, faithfulness, recheck, score_edges
from glasshouse.interp.circuits.circuit import measured
from glasshouse.interp.formats.mib import Shape, read_circuit
from interp.circuits.byhand import CONFIGS, contrast, noisy

ABOUT = About("by hand", "corrupt", "LogitDifference", 3, "d" * 64, "m" * 64)


def found(seed: int = 0, n_edges: int = 12, **features):
    model = noisy(seed, **features)
    data = contrast(model)
    return model, data, score_edges(Patcher(model, data), "eap").circuit(n_edges)


def test_a_circuit_read_back_is_the_circuit(tmp_path):
    model, data, circuit = found()
    circuit = measured(circuit, faithfulness(Patcher(model, data), circuit, random=2).recovered)
    circuit.save(tmp_path / "circuit.json")
    back = Circuit.load(tmp_path / "circuit.json")
    assert back.graph == circuit.graph and back.about == circuit.about and back.recovered == circuit.recovered
    assert (back.scores == circuit.scores).all() and (back.kept == circuit.kept).all()


def test_files_are_those_of_the_benchmark(tmp_path):
    """Read by the reader that is tested against files of EAP-IG."""
    _, _, circuit = found()
    circuit.save(tmp_path / "circuit.json")
    theirs = read_circuit(tmp_path / "circuit.json", Shape(2, 4, 24))
    assert theirs.inside == set(circuit.edges) and theirs.complete
    assert all(theirs.edges[e].score == circuit.scores[circuit.graph.number[e]] for e in circuit.graph.edges)
    assert {name for name, inside in theirs.nodes.items() if inside} == {*circuit.nodes, "logits"}


def test_files_without_our_facts_and_with_edges_left_out_are_read(tmp_path):
    _, _, circuit = found()
    data = circuit.to_mib()
    del data["glasshouse"]
    del data["edges"]["input->m0"]
    (tmp_path / "theirs.json").write_text(json.dumps(data))
    back = Circuit.load(tmp_path / "theirs.json")
    assert back.about.method == "unknown" and back.scores[back.graph.number["input->m0"]] == 0


def test_a_circuit_over_two_input_nodes_is_kept_too(tmp_path):
    model = noisy(**CONFIGS["gpt2"])
    data = contrast(model)
    circuit = score_edges(Patcher(model, data, "zero", split_input=True), "eap").circuit(9)
    circuit.save(tmp_path / "circuit.json")
    back = Circuit.load(tmp_path / "circuit.json")
    assert back.graph.split_input and back.edges == circuit.edges
    assert recheck(back, model, data, "zero", random=2).same_model


def test_damaged_files_are_named(tmp_path):
    _, _, circuit = found()
    path = tmp_path / "circuit.json"
    whole = circuit.to_mib()

    def refuses(message: str, **change):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(CheckpointError, match=message):
            Circuit.load(path)

    refuses("'cfg' is missing", cfg=None)
    refuses("cfg: 'n_heads' is 0", cfg={**whole["cfg"], "n_heads": 0})
    refuses("absurd", cfg={**whole["cfg"], "n_heads": 2**15})
    refuses("no node 'm9'", edges={**whole["edges"], "m9->logits": {"score": 1, "in_graph": True}})
    refuses("edge 'input->m0': score True must", edges={"input->m0": {"score": True, "in_graph": True}})
    refuses("edge 'input->m0': needs 'score'", edges={"input->m0": {"score": 1.0}})
    refuses("'edges' is missing", edges=[])
    refuses("selects neurons", nodes={**whole["nodes"], "m0": {"in_graph": True, "neurons": [1]}})
    refuses("unexpected keyword", glasshouse={**whole["glasshouse"], "surprise": 1})
    path.write_text(json.dumps(whole)[:-9])
    with pytest.raises(CheckpointError, match="circuit.json"):
        Circuit.load(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Circuit.load(path)


def test_edges_at_a_node_that_a_file_leaves_out_are_not_in_the_circuit(tmp_path):
    """As the benchmark's own program reads files that it has not pruned."""
    model = noisy()
    whole = Circuit.of(model, ["input->m0", "m0->m1", "m0->logits", "m1->logits"], ABOUT).to_mib()
    whole["nodes"]["m1"]["in_graph"] = False
    (tmp_path / "circuit.json").write_text(json.dumps(whole))
    assert set(Circuit.load(tmp_path / "circuit.json").edges) == {"input->m0", "m0->logits"}


def test_a_later_checkpoint_is_checked_and_said_to_be_another():
    model, data, circuit = found()
    here, later = recheck(circuit, model, data, random=3), recheck(circuit, noisy(1), data, random=3)
    assert here.same_model and not later.same_model
    assert "another model" in str(later) and "another model" not in str(here)
    assert here.recovered != later.recovered
    with pytest.raises(UsageError, match="2 layers of|of 2 layers and 4 heads does not fit"):
        recheck(circuit, noisy(n_layer=1), data)


def test_two_circuits_are_compared_edge_by_edge():
    model = noisy()
    a = Circuit.of(model, ["input->m0", "m0->logits", "m0->m1"], ABOUT)
    b = Circuit.of(model, ["input->m0", "m0->logits", "m1->logits"], ABOUT)
    diff = a.diff(b)
    assert (diff.removed, diff.added) == (("m0->m1",), ("m1->logits",))
    assert set(diff.shared) == {"input->m0", "m0->logits"} and diff.overlap == 0.5
    assert str(diff) == "2 edges shared, 1 gone, 1 new (overlap 0.50)"
    assert "m1-&gt;logits" in diff._repr_html_()
    assert a.diff(a).overlap == 1.0
    with pytest.raises(UsageError, match="different shapes"):
        a.diff(Circuit.of(noisy(n_layer=1), ["input->m0"], ABOUT))


def test_a_circuit_shows_itself():
    _, _, circuit = found()
    shown = circuit._repr_html_()
    assert "<svg" in shown and shown.count("<path") == 12 and "ablation corrupt" in shown
    assert all(f">{name}<" in shown for name in circuit.nodes)
    hostile = Circuit(circuit.graph, circuit.scores, circuit.kept, About("<script>", "x", "y", 1, "", ""))
    assert "<script>" not in hostile._repr_html_()


def test_scores_become_circuits_in_the_ways_that_are_documented():
    model = noisy()
    scores = score_edges(Patcher(model, contrast(model)), "eap")
    assert len(scores.circuit(7)) == 7
    bar = float(np.sort(np.abs(scores.values))[-5])
    assert len(scores.circuit(threshold=bar)) == 5
    grown = scores.circuit(7, greedy=True)
    assert len(grown) == 7 and (scores.graph.greedy(scores.values, 7) == grown.kept).all()
    assert (scores.circuit(7, prune=True).kept == scores.graph.prune(scores.circuit(7).kept)).all()
    assert scores.circuit(3, absolute=False).edges[0] == scores.graph.edges[int(scores.values.argmax())]
    assert scores[scores.graph.edges[5]] == scores.values[5]
    assert "<svg" in scores._repr_html_()
    for wrong in ({}, {"n_edges": 3, "threshold": 0.1}):
        with pytest.raises(UsageError, match="either n_edges or threshold"):
            scores.circuit(**wrong)
    with pytest.raises(UsageError, match="1 to"):
        scores.circuit(0)
    with pytest.raises(UsageError, match="no edge 'a9"):
        Circuit.of(model, ["a9.h0->logits"], ABOUT)
    with pytest.raises(UsageError, match="not a finite number"):
        Circuit(scores.graph, np.full(len(scores.values), np.nan), scores.circuit(3).kept, ABOUT)
