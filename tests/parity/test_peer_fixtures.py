"""What other packages wrote means to us what it means to them, and what we write they can hold.

The files were made by the real packages (``run_peers --keep``, see fixtures/README.md); running those again
is `make parity`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glasshouse.interp.formats import read_circuit, read_graph
from parity.format_cases import CLOSE, FIXTURES, READERS, circuit_distance, graph_distance, of_theirs

CASES = [
    pytest.param(peer, folder, id=f"{peer}-{folder.name}")
    for peer in READERS
    for folder in sorted((FIXTURES / peer).iterdir())
    if folder.is_dir()
]
CIRCUITS = sorted(path for path in (FIXTURES / "mib").glob("*.json") if path.stem != "versions")


def test_every_package_left_its_cases():
    assert len(CASES) == 16 + 4 + 7
    assert len(CIRCUITS) == 4
    for name in (*READERS, "tracer", "mib"):
        said = json.loads((FIXTURES / name / "versions.json").read_text("utf-8"))
        assert all(said["licences"].values()), name


@pytest.mark.parametrize(("peer", "folder"), CASES)
def test_features_and_outputs_equal_those_the_package_computed(peer: str, folder: Path):
    assert of_theirs(peer, folder) <= CLOSE


@pytest.mark.parametrize(("peer", "folder"), CASES)
def test_the_expectation_could_fail(peer: str, folder: Path):
    """Some features fire and some do not, in every case: zeros would equal zeros."""
    features = load_file(folder / "expected.safetensors")["features"]
    fired = (features > 0).float().mean()
    assert 0.02 < fired < 0.98
    with torch.no_grad():
        dictionary = READERS[peer](folder)
        dictionary.W_enc.mul_(1.001)
        assert (
            dictionary.encode(load_file(folder / "expected.safetensors")["x"]) - features
        ).abs().max() > CLOSE


def test_the_attribution_graph_of_circuit_tracer_is_read_whole():
    assert graph_distance(FIXTURES / "tracer" / "graph") == 0.0
    graph = read_graph(FIXTURES / "tracer" / "graph" / "tiny.json")
    assert {n.kind for n in graph.nodes} == {"token", "feature", "error", "logit"}


@pytest.mark.parametrize("path", CIRCUITS, ids=lambda path: path.stem)
def test_circuits_of_eap_ig_are_read_edge_by_edge(path: Path):
    assert circuit_distance(path) == 0.0


@pytest.mark.parametrize("name", ["serial", "parallel"])
def test_an_unpruned_circuit_keeps_only_edges_whose_ends_are_in_it(name: str):
    pruned = read_circuit(FIXTURES / "mib" / f"{name}.json")
    unpruned = read_circuit(FIXTURES / "mib" / f"{name}_unpruned.json")
    marked = {edge for edge, scored in unpruned.edges.items() if scored.in_graph}
    assert pruned.inside <= unpruned.inside < marked and len(marked) == 12
