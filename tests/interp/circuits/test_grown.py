"""A combination of two words, learned in seconds: its circuit is found, removed, kept in a file, re-checked
on another model and compared.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glasshouse.interp.circuits import Circuit, Patcher, faithfulness, recheck, score_edges
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.model import GPT
from glasshouse.recipes.lens.tasks import repeated
from interp.probes.combos import MATCH, NO, WORDS, YES, grid, grown

pytestmark = pytest.mark.usefixtures("one_thread")
EDGES, SEED = 30, 5
ABOUT = grid(MATCH)


def matched(n: int, seed: int) -> Contrast:
    """Pairs whose classes match; in the twin the first word (even rows) or the second has the other class."""
    drawn, rows, twins = torch.Generator().manual_seed(seed), [], []
    while len(rows) < n:
        a, b, other = torch.randint(WORDS, (3,), generator=drawn).tolist()
        one, two = (other, b) if len(rows) % 4 < 2 else (a, other)
        if ABOUT.label[a, b] and not ABOUT.label[one, two]:
            rows.append(ABOUT.tokens[a, b])
            twins.append(ABOUT.tokens[one, two])
    answers = [torch.full((n,), word) for word in (YES, NO)]
    return Contrast(torch.stack(rows), torch.stack(twins), LogitDifference(*answers, at=torch.full((n,), 3)))


@pytest.fixture(scope="module")
def model() -> GPT:
    return grown(ABOUT, "truth", seed=SEED, n_head=4)


@pytest.fixture(scope="module")
def later() -> GPT:
    return grown(ABOUT, "truth", seed=SEED, steps=210, n_head=4)


@pytest.fixture(scope="module")
def found(model: GPT) -> Circuit:
    return score_edges(Patcher(model, matched(32, seed=11)), "eap-ig").circuit(EDGES, prune=True)


def test_a_grown_combination_has_a_circuit_that_carries_it_and_random_ones_of_its_size_do_not(
    model: GPT, found: Circuit
) -> None:
    measured = faithfulness(Patcher(model, matched(64, seed=12)), found)
    assert measured.recovered.low > 0.8
    assert measured.random.high < 0.5 and measured.beaten.value == 1


def test_cutting_its_circuit_removes_the_combination_and_cutting_random_edges_removes_less(
    model: GPT, found: Circuit
) -> None:
    measured = faithfulness(Patcher(model, matched(64, seed=12)), found)
    assert measured.left.high < 0.2 and measured.random_left.low > measured.left.high


def test_a_saved_circuit_is_rechecked_on_another_checkpoint_and_compared_with_its_own(
    found: Circuit, later: GPT, tmp_path: Path
) -> None:
    found.save(tmp_path / "circuit.json")
    kept = Circuit.load(tmp_path / "circuit.json")
    again = recheck(kept, later, matched(64, seed=12))
    assert not again.same_model and again.recovered.low > 0.6
    anew = score_edges(Patcher(later, matched(32, seed=11)), "eap-ig").circuit(EDGES, prune=True)
    diff = kept.diff(anew)
    assert diff.overlap > 0.4 and len(diff.shared) + len(diff.removed) == len(kept)


def test_only_the_order_of_the_same_tokens_tells_an_induction_row_from_its_twin() -> None:
    contrast = repeated(torch.arange(5, 40), 12, [3], seed=2)
    assert isinstance(contrast.metric, LogitDifference)
    for clean, twin, right, wrong in zip(
        contrast.clean.tolist(),
        contrast.corrupt.tolist(),
        contrast.metric.right.tolist(),
        contrast.metric.wrong.tolist(),
        strict=True,
    ):
        assert sorted(clean) == sorted(twin) and clean[13:] == twin[13:]
        for row, follows in ((clean, right), (twin, wrong)):
            assert row[row.index(row[-1]) + 1] == follows
        assert right != wrong and clean.index(clean[-1]) != twin.index(twin[-1])
