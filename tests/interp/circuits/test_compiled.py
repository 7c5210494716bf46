"""Compiled programs: their known circuits are found, and single effects are those of an independent forward.

Lists and effects in the files come from structure and from a numpy forward pass that is not ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.interp.circuits import Patcher, pooled, score_edges
from glasshouse.interp.metric import Contrast, Distance
from glasshouse.model.compiled_circuits import CompiledProgram, load_compiled

SHARED = Path(__file__).resolve().parents[4] / "shared" / "circuits"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the compiled programs are not at {SHARED}")
MATCHING = {"corrupt": "causal_edges", "zero": "zero_ablation_edges"}
EFFECTS = {"corrupt": "edge_resample_effect", "zero": "edge_zero_effect"}
CASES = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ("hist", "reverse") for kind in ("corrupt", "zero")]
)


def patchers(name: str, kind: str) -> Iterator[tuple[CompiledProgram, Patcher]]:
    """One for each length of the program's examples, which are paired in the order they stand."""
    program = load_compiled(SHARED / f"{name}.npz")
    symbols = [example["x"] for example in json.loads((SHARED / f"{name}.io.json").read_text())]
    for length in sorted({len(x) for x in symbols}):
        rows = torch.cat([program.encode(x) for x in symbols if len(x) == length])
        pairs = len(rows) // 2 * 2
        clean, corrupt = rows[0:pairs:2], rows[1:pairs:2]
        with torch.no_grad():
            reference = program.model(clean)
        metric = Distance(reference)
        yield program, Patcher(program.model, Contrast(clean, corrupt, metric), kind, split_input=True)


@CASES
@pytest.mark.parametrize("method", ["exact", "eap-ig", "eap-ig-activations", "acdc"])
def test_the_edges_that_match_the_ablation_are_found(name, kind, method):
    parts = []
    for program, patcher in patchers(name, kind):
        assert program.name == name
        parts.append(score_edges(patcher, method))
    scores = pooled(parts)
    known, candidates = program.edges(MATCHING[kind]), program.edges("candidate_edges")
    assert scores.auroc(known, candidates).value == 1.0
    if method == "acdc":
        assert set(scores.circuit().edges) == {"->".join(edge) for edge in known}


@CASES
def test_single_effects_are_those_of_the_independent_forward(name, kind):
    effects = []
    for program, patcher in patchers(name, kind):
        assert program.name == name
        n = len(patcher.graph.edges)
        with torch.no_grad():
            logits = patcher.logits(torch.from_numpy(patcher.graph.matrix(~np.eye(n, dtype=bool))))
        reference = patcher.contrast.metric.reference
        effects.append((logits.unflatten(0, (n, -1)) - reference).abs().amax((1, 2, 3)).numpy())
    found = np.max(effects, axis=0)
    theirs = np.array([program.about[EFFECTS[kind]][edge] for edge in patcher.graph.edges])
    assert ((found > 1e-3) == (theirs > 1e-3)).all()
    # A largest effect depends on which examples were tried; two edges of one program differ by that.
    assert (np.abs(found - theirs) < 1e-5).mean() > 0.97


def test_a_gradient_at_a_flat_metric_sees_nothing():
    """Why plain attribution patching is not enough: the distance to one's own output has no slope there."""
    for _, patcher in patchers("hist", "corrupt"):
        assert np.abs(score_edges(patcher, "eap").values).max() < 1e-6
