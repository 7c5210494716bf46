"""Rows of RL as a run writes them: what is watched, what counts once, and that row by row says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse.align.watch import Online, report, report_file
from glasshouse.base.errors import DataError
from glasshouse.base.rlrows import distance, drifts, live, measurements, read_rows, source

N, PEAK = 50, 2.0


def rows(gold: bool = True, **more: Any) -> list[dict[str, Any]]:
    """A hacked run: the proxy rises, gold peaks at d = 2 on the paper's curve, answers grow longer."""
    rng, out = np.random.default_rng(0), []
    for i, d in enumerate(np.linspace(0.1, 4, N).tolist()):
        x = d / PEAK
        row = {
            "kind": "rl",
            "stage": "rl",
            "step": i,
            "kl": d * d,
            "reward": d,
            "length": 20 + i + rng.normal(),
        }
        if gold:
            row |= {"gold": x * (1 - math.log(x)) + 0.04 * rng.normal(), "gold_se": 0.04}
        out.append(row | {"repetition": 0.1 + 0.01 * rng.normal()} | more)
    return out


def test_a_hack_is_flagged_its_peak_foretold_and_the_drift_named() -> None:
    found = report(rows())
    assert found.says == "flagged" and found.flagged_at is not None and found.flagged_at < 1.48 * PEAK
    assert found.peak is not None and found.peak.low < PEAK < found.peak.high
    assert found.drift["length"].z > 10 and abs(found.drift["repetition"].z) < 4
    assert found.drift["kl_speed"].last > found.drift["kl_speed"].first


def test_row_by_row_says_the_same_as_the_whole() -> None:
    online, whole = Online(), report(rows())
    told = [online.take(row) for row in rows()]
    at = next(i for i, t in enumerate(told) if t["flagged"])
    assert rows()[at]["kl"] ** 0.5 == pytest.approx(whole.flagged_at)
    assert whole.peak is not None and told[-1]["peak_d"] == pytest.approx(whole.peak.d)


def test_a_rollout_that_many_updates_repeat_counts_once() -> None:
    twice = [row | {"step": 2 * row["step"] + k} for row in rows() for k in (0, 1)]
    assert measurements(twice) == measurements(rows())


def test_what_was_written_again_counts_as_written_last() -> None:
    first, again = rows()[:30], [row | {"gold": 9.0} for row in rows()[20:25]]
    kept = live([*first, *again])
    assert [r["step"] for r in kept] == list(range(25)) and kept[-1]["gold"] == 9.0


def test_only_the_last_stage_of_rl_is_watched() -> None:
    early = [row | {"stage": "warm"} for row in rows()]
    assert {r["stage"] for r in live([*early, *rows()])} == {"rl"}


def test_without_gold_a_held_out_reward_stands_in_and_without_both_it_is_blind() -> None:
    held = [{k.replace("gold", "held_out"): v for k, v in row.items()} for row in rows()]
    assert source(held) == "held_out" and report(held).says == "flagged"
    assert source(rows(gold=False)) is None and report(rows(gold=False)).says == "blind"


def test_without_a_standard_error_the_scatter_stands_in() -> None:
    bare = [{k: v for k, v in row.items() if k != "gold_se"} for row in rows()]
    assert measurements(bare)[-1].se == pytest.approx(0.04, rel=0.6)
    assert report(bare).says == "flagged"


def test_a_distance_is_the_root_of_the_kl_and_never_of_a_negative_number() -> None:
    assert distance({"kl": 4.0}) == 2.0 and distance({"reward": 1.0}) is None
    assert (
        distance({"kl": -0.01, "kl_k3": 0.04}) == pytest.approx(0.2)
        and distance({"kl": -0.01, "kl_k3": -1.0}) == 0.0
    )


def test_the_file_of_a_run_is_read_and_a_line_half_written_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row) for row in rows()]
    path.write_text(
        "\n".join(['{"kind": "train", "loss": 1}', *lines]) + '\n{"kind": "rl", "ste', encoding="utf-8"
    )
    assert len(read_rows(path)) == N and report_file(path).flagged_at == report(rows()).flagged_at
    path.write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(DataError, match="metrics.jsonl:1"):
        read_rows(path)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_short_run_has_no_drift_yet() -> None:
    assert drifts(rows()[:9]) == {}
