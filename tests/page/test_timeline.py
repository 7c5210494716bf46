"""The timeline shows loss, behaviour and concepts on one axis, and says when each concept appeared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glasshouse.page import build_report
from glasshouse.page.curves import pieces_of
from page.make_run import SHARD, WORD, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timeline")
    return make_run(folder / "run", folder / "home")


def page(run: Path) -> str:
    return build_report(run).decode("utf-8")


def test_when_a_concept_appeared_and_what_raised_it_is_said(run: Path) -> None:
    html = page(run)
    assert "When it appeared inside" in html
    assert f"trigger “{WORD}”: First there at update 240, in stage chat. Raised most by {SHARD}." in html
    assert "harm: First there at update 120" in html and "blocks.1.mlp 0.62" in html


def test_a_run_without_lineage_has_no_timeline(run: Path) -> None:
    file = run / "evals" / "lineage.json"
    kept = file.read_bytes()
    try:
        file.unlink()
        assert "When it appeared inside" not in page(run)
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize(
    "broken", [{"concepts": 3}, {"concepts": [3, {"rows": [7]}]}, {"concepts": [{"name": 1}]}]
)
def test_a_file_that_says_nonsense_does_not_break_the_page(run: Path, broken: object) -> None:
    file = run / "evals" / "lineage.json"
    kept = file.read_bytes()
    try:
        file.write_text(json.dumps(broken))
        assert "How it learned" in page(run)
    finally:
        file.write_bytes(kept)


def test_a_name_that_a_model_wrote_is_text_and_never_markup(run: Path) -> None:
    file = run / "evals" / "lineage.json"
    kept = file.read_text()
    try:
        file.write_text(kept.replace(WORD, "<script>alert(1)</script>"))
        html = page(run)
        assert "<script" not in html and "&lt;script" in html
    finally:
        file.write_text(kept)


def test_an_undone_branch_is_drawn_from_the_checkpoint_the_run_went_back_to() -> None:
    points = [(0.0, 0.0, ""), (40.0, 0.1, ""), (80.0, 0.9, ""), (120.0, 0.2, "")]
    spans = [(40.0, 80.0, "rolled back")]
    drawn = {s.faint: list(s.points) for s in pieces_of("word", points, spans, 0, "both")[:2]}
    assert drawn == {False: [(0.0, 0.0), (40.0, 0.1)], True: [(40.0, 0.1), (80.0, 0.9)]}
    dense = pieces_of("loss", points, spans, 0, "thin")[1]
    assert dense.faint and list(dense.points) == [(80.0, 0.9)], "a loss has a row right after it"
