"""The report shows a reward beside what it is for, the fitted curve with its peak, and bears nonsense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse.align.watch import Online
from glasshouse.page import build_report
from page.make_run import make_run
from page.test_report import Page, closed


def reported(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    """The page's text."""
    run = make_run(tmp_path / "run", tmp_path / "home", "clean")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            place = {"t": 1.0, "update": 10 + i, "stage": "rl", "step": i, "attempt": 0, "kind": "rl"}
            file.write(json.dumps(place | row) + "\n")
    page = Page(build_report(run).decode())
    closed(page)
    return page.text


def hack(n: int = 50) -> list[dict[str, Any]]:
    """Gold peaks at a distance of 2 on the paper's curve; the rows hold what the watch wrote."""
    rng, watch, out = np.random.default_rng(0), Online(), []
    for i, d in enumerate(np.linspace(0.1, 4, n).tolist()):
        gold = d / 2 * (1 - math.log(d / 2)) + 0.03 * rng.normal()
        row = {"kl": d * d, "reward": d, "gold": gold, "gold_se": 0.03, "length": 20.0 + i, "step": i}
        out.append(row | watch.take(row))
    return out


def test_a_hack_is_drawn_with_its_curve_its_flag_and_its_foretold_peak(tmp_path: Path) -> None:
    page = reported(tmp_path, hack())
    assert "The reward, and what it is for" in page and "What drifted under RL" in page
    for text in ("flagged", "foretold peak", "fitted curve", "reward that is trained on", "tokens an answer"):
        assert text in page, text


def test_a_run_without_gold_has_the_drift_alone_and_one_without_rl_neither(tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if k in ("kl", "reward", "length")} for row in hack()]
    page = reported(tmp_path / "a", bare)
    assert "The reward, and what it is for" not in page and "What drifted under RL" in page
    assert "What drifted under RL" not in reported(tmp_path / "b", [])


@pytest.mark.parametrize(
    "wrong", [{"gold": "<script>"}, {"kl": 1e308}, {"gold_se": -1.0}, {"d": [3]}, {"gold": 1e300}]
)
def test_nonsense_in_rows_is_borne(tmp_path: Path, wrong: dict[str, Any]) -> None:
    page = reported(tmp_path, [row | (wrong if i % 3 else {}) for i, row in enumerate(hack(30))])
    assert "<script>" not in page
