"""Attribution graphs survive the viewer's JSON, and a graph that cannot be true is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.formats.graph import AttributionGraph, GraphLink, GraphNode
from glasshouse.interp.formats.viewer import graph_json, pair, read_graph, write_graph

TOKEN = GraphNode("token", 0, 7)
FEATURE = GraphNode("feature", 1, 5, 0, activation=2.5, influence=0.4, label="dragons")
ERROR = GraphNode("error", 1, None, 1, influence=0.8)
LOGIT = GraphNode("logit", 1, 9, probability=0.25, label=" soup", target=True)
LINKS = (
    GraphLink("E_7_0", "0_5_1", 1.5),
    GraphLink("0_5_1", "L_9_1", -0.25),
    GraphLink("err_1_1", "L_9_1", 0.125),
)


def graph(nodes: Any = (TOKEN, FEATURE, ERROR, LOGIT), links: Any = LINKS, **more: Any) -> AttributionGraph:
    given = {"facts": {"model_digest": "ab", "n": 3}, **more}
    return AttributionGraph("a-graph", "tiny", "the soup", ("the", " soup"), 2, nodes, links, **given)


def written(tmp_path: Path, data: dict[str, Any]) -> Path:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(data), "utf-8")
    return path


@st.composite
def graphs(draw: st.DrawFn) -> AttributionGraph:
    n_layer, n_pos = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    real = st.floats(-1e6, 1e6, allow_nan=False)
    share = st.none() | st.floats(0, 1)
    label = st.text(max_size=8).filter(lambda s: "(p=" not in s)  # changed on purpose, tested below
    pos, layer, index = st.integers(0, n_pos - 1), st.integers(0, n_layer - 1), st.integers(0, 99_999)
    kinds = {
        "token": st.builds(GraphNode, st.just("token"), pos, index, label=label),
        "feature": st.builds(
            GraphNode, st.just("feature"), pos, index, layer, st.none() | real, share, label=label
        ),
        "error": st.builds(GraphNode, st.just("error"), pos, st.none(), layer, influence=share, label=label),
        "logit": st.builds(
            GraphNode, st.just("logit"), pos, index, probability=st.floats(0, 1), label=label,
            target=st.booleans(),
        ),
    }  # fmt: skip
    nodes = draw(st.lists(st.one_of(*kinds.values()), max_size=12, unique_by=lambda n: n.name))
    height = {"token": -1, "logit": n_layer}
    pairs = [
        (a, b)
        for a in nodes
        for b in nodes
        if b.kind in ("feature", "logit") and a.pos <= b.pos
        and height.get(a.kind, a.layer) < height.get(b.kind, b.layer)
    ]  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    links = tuple(GraphLink(a.name, b.name, draw(real)) for a, b in chosen)
    tokens = tuple(draw(st.lists(st.text(max_size=5), min_size=n_pos, max_size=n_pos)))
    return AttributionGraph("g", "m", draw(st.text()), tokens, n_layer, tuple(nodes), links, {"n": 1})


@given(graphs())
def test_any_graph_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, made: AttributionGraph):
    path = tmp_path_factory.mktemp("g") / "g.json"
    write_graph(path, made)
    assert read_graph(path) == made


def test_equal_graphs_give_equal_bytes(tmp_path):
    write_graph(tmp_path / "a.json", graph())
    write_graph(tmp_path / "b.json", graph())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_keys_are_those_the_viewer_asks_for():
    data = graph_json(graph(), node_threshold=0.8)
    assert {"slug", "scan", "prompt_tokens", "prompt", "node_threshold"} <= data["metadata"].keys()
    assert data["qParams"].keys() == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    for node in data["nodes"]:
        assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"} <= node.keys()
    by_id = {n["node_id"]: n for n in data["nodes"]}
    assert by_id["0_5_1"]["feature"] == pair(0, 5) == 20 and by_id["0_5_1"]["layer"] == "0"
    assert by_id["E_7_0"]["layer"] == "E" and by_id["err_1_1"]["feature"] == -1
    assert by_id["L_9_1"]["clerp"] == 'Output " soup" (p=0.250)' and by_id["L_9_1"]["layer"] == "3"


def test_a_threshold_is_given_only_where_every_node_says_its_influence():
    silent = (TOKEN, GraphNode("feature", 1, 5, 0), ERROR, LOGIT)
    assert "node_threshold" not in graph_json(graph(silent), node_threshold=0.8)["metadata"]


def test_a_token_that_looks_like_a_probability_does_not_mislead_the_viewer():
    hostile = GraphNode("logit", 1, 9, probability=0.5, label='" (p=1.0)')
    label = graph_json(graph((hostile,), ()))["nodes"][0]["clerp"]
    assert float(label.split("(p=")[1].split(")")[0]) == 0.5  # what the viewer's script does


def test_no_two_features_of_different_layers_share_a_page_number():
    assert len({pair(layer, i) for layer in range(40) for i in range(500)}) == 40 * 500


@pytest.mark.parametrize(
    ("nodes", "links", "message"),
    [
        ((TOKEN, TOKEN), (), "two nodes are called 'E_7_0'"),
        ((TOKEN,), (GraphLink("E_7_0", "E_7_1", 1.0),), "no node is called 'E_7_1'.*E_7_0"),
        ((TOKEN, FEATURE), (GraphLink("E_7_0", "0_5_1", math.nan),), "weight is nan"),
        ((TOKEN, FEATURE), (GraphLink("0_5_1", "E_7_0", 1.0),), "nothing in the graph explains a token"),
        ((LOGIT, FEATURE), (GraphLink("L_9_1", "0_5_1", 1.0),), "runs against the model"),
        (
            (GraphNode("token", 1, 3), GraphNode("feature", 0, 1, 0)),
            (GraphLink("E_3_1", "0_1_0", 1.0),),
            "later",
        ),
        ((TOKEN, FEATURE), (GraphLink("E_7_0", "0_5_1", 1.0),) * 2, "linked twice"),
        ((GraphNode("feature", 1, 5, 2),), (), "layer 2 is outside the model's 2"),
        ((GraphNode("feature", 5, 5, 0),), (), "position 5 is outside the 2"),
        ((GraphNode("feature", 1, None, 0),), (), "index None does not fit a feature"),
        ((GraphNode("token", 1, 3, 0),), (), "a token has no layer"),
        ((GraphNode("logit", 1, 3),), (), "logits have a probability"),
        ((GraphNode("feature", 1, 5, 0, activation=math.inf),), (), "activation is inf"),
    ],
)
def test_a_graph_that_cannot_be_true_is_refused(nodes, links, message):
    with pytest.raises(UsageError, match=message):
        graph(nodes, links)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("links"), "'links' is missing"),
        (lambda d: d["metadata"].pop("slug"), "'slug' is missing"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "two nodes have the id 'E_7_0'"),
        (lambda d: d["nodes"][1].update(feature_type="neuron"), "feature_type 'neuron'; known: embedding"),
        (lambda d: d["nodes"][1].update(ctx_idx="1"), "'ctx_idx' must be int, not str"),
        (lambda d: d["nodes"][1].update(ctx_idx=True), "'ctx_idx' must be int, not bool"),
        (lambda d: d["nodes"][1].update(node_id="0_6_1"), "does not belong to this id"),
        (lambda d: d["nodes"][1].update(layer="1"), "as its fields say"),
        (lambda d: d["nodes"][2].update(layer="deep"), "is not a layer's number"),
        (lambda d: d["links"][0].update(target="0_5_9"), "no node has the id '0_5_9'.*0_5_1"),
        (lambda d: d["links"][0].update(weight="1"), "'weight' must be float, not str"),
        (lambda d: d["links"].append("x"), "expected an object, found str"),
        (lambda d: d["metadata"].update(prompt_tokens=[1]), "prompt_tokens must be texts"),
    ],
)
def test_a_damaged_file_is_refused_and_the_place_named(tmp_path, spoil, message):
    data = graph_json(graph())
    spoil(data)
    with pytest.raises(CheckpointError, match=message):
        read_graph(written(tmp_path, data))


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    text = json.dumps(graph_json(graph()))
    for wrong, message in (("NaN", "NaN is not JSON"), ("1e999", "weight is inf")):
        (tmp_path / "g.json").write_text(text.replace("-0.25", wrong), "utf-8")
        with pytest.raises(CheckpointError, match=message):
            read_graph(tmp_path / "g.json")


@pytest.mark.parametrize("slug", ["../up", "a/b", "", ".hidden", "a" * 200])
def test_a_slug_that_is_no_file_name_is_refused(tmp_path, slug):
    made = AttributionGraph(slug, "m", "", ("a",), 1, (), ())
    with pytest.raises(UsageError, match="slug"):
        write_graph(tmp_path / "g.json", made)


def test_circuit_tracers_own_ambiguous_ids_are_refused_not_guessed(tmp_path):
    data = graph_json(graph((GraphNode("feature", 1, 1, 0), ERROR), ()))
    data["nodes"][1]["node_id"] = "0_1_1"  # as circuit-tracer 0.5.0 calls the error of layer 1 at position 1
    with pytest.raises(CheckpointError, match="two nodes have the id '0_1_1'"):
        read_graph(written(tmp_path, data))


def test_what_prompt_and_features_say_is_shown_escaped():
    made = AttributionGraph("g", "m", "<script>", ("a",), 1, (), ())
    assert "<script>" not in made._repr_html_() and "&lt;script&gt;" in made._repr_html_()
    assert "dragons" in graph()._repr_html_()


def test_links_into_a_node_come_strongest_first():
    assert [k.source for k in graph().into("L_9_1")] == ["0_5_1", "err_1_1"]
    with pytest.raises(UsageError, match="no node 'L_9_2'"):
        graph().into("L_9_2")
