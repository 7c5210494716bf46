"""What monitors saw and which updates were spikes is in the report, and harmless when it is nonsense."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from glasshouse.page import build_report
from glasshouse.page.monitors import noise_scale, shown_layers
from page.make_run import make_run
from page.test_report import Page, closed


def look(update: int, **changes: Any) -> dict[str, Any]:
    place = {"t": 1.0, "update": update, "stage": "read", "step": update, "attempt": 0, "kind": "monitor"}
    layered = {
        "resid_rms": [1.0 + i for i in range(7)],
        "attn_entropy": [0.9] * 7,
        "attn_entropy_min": [0.2] * 7,
        "attn_logit_max": [3.0 * (i + 1) for i in range(7)],
        "dead_units": [0.125] * 7,
        "update_ratio": [1e-3 * (i + 1) for i in range(7)],
    }
    whole = {"logit_max": 9.0, "log_z": 3.0, "noise_signal": 0.5, "noise_trace": 8.0}
    return {**place, **layered, **whole, **changes}


def spike(update: int, **changes: Any) -> dict[str, Any]:
    place = {"t": 1.0, "update": update, "stage": "read", "step": update, "attempt": 0, "kind": "spike"}
    return {
        **place,
        "what": "gradient norm",
        "value": 81.5,
        "limit": 3.25,
        "action": "skip",
        "shards": ["tales"],
    } | changes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tmp_path / "home", "clean")


def with_rows(run: Path, *rows: dict[str, Any]) -> Page:
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + "".join(json.dumps(r) + "\n" for r in rows))
    page = build_report(run)
    assert page == build_report(run)
    parsed = Page(page.decode())
    closed(parsed)
    return parsed


def test_a_run_that_was_not_watched_has_neither_charts_nor_table(run: Path) -> None:
    text = with_rows(run).text
    assert "Inside the model" not in text and "Spikes" not in text


def test_every_monitor_is_drawn_by_layer(run: Path) -> None:
    page = with_rows(run, *(look(n) for n in (100, 200, 300)))
    charts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    for name in (
        *("update over weight", "residual stream", "attention entropy", "largest attention logit"),
        *("silent MLP units", "largest output logit", "log normaliser", "gradient noise scale"),
    ):
        assert any(name in c for c in charts), name
    assert "layer 0" in page.text and "layer 6" in page.text and "layer 1" not in page.text


def test_a_spike_is_told_with_what_was_done(run: Path) -> None:
    text = with_rows(run, spike(40), spike(41, what="loss", value="nan", limit=None)).text
    assert re.search(r"gradient norm\s*81.5\s*3.25\s*skipped\s*tales", text)
    assert "nan" in text


@pytest.mark.parametrize(
    "row",
    [
        look(100, resid_rms="much", update_ratio=[None, "x"], noise_trace=None),
        look(100, resid_rms=[], dead_units=[float(10**6)] * 3, attn_logit_max=[-1.0] * 7),
        spike(40, what="<b>loud</b>", value=None, shards="tales", action=["skip"]),
        spike(40, shards=[1, {}, None], limit="x"),
    ],
)
def test_nonsense_is_left_out_and_nothing_runs(run: Path, row: dict[str, Any]) -> None:
    page = with_rows(run, row, look(200), look(300))
    assert "Inside the model" in page.text, "the other rows are still shown"


def test_at_most_five_layers_are_shown_the_first_and_last_among_them() -> None:
    assert shown_layers(3) == [0, 1, 2] and shown_layers(0) == []
    assert shown_layers(24) == [0, 6, 12, 17, 23]


def test_gradient_noise_is_averaged_within_a_stage_before_it_is_divided() -> None:
    rows = [look(1, noise_signal=-1.0), look(2, noise_signal=3.0), look(3, stage="chat", noise_signal=2.0)]
    assert [value for _, value in noise_scale(rows)] == [None, 8.0, 4.0]


def test_what_was_rewound_is_drawn_as_undone(tmp_path: Path) -> None:
    from page.make_run import Writer

    writer = Writer(tmp_path / "run", tmp_path / "home")
    writer.recipe()
    writer.train("read", 0, 0, 40, 1.0, 2.0)
    head = writer.checkpoint("read", 40, 0)
    writer.train("read", 0, 40, 60, 1.0, 2.0)
    body = {"checkpoint": head, "action": "rewind", "update": 60, "left_out": [56, 59], "reason": "a spike"}
    writer.ledger.append("spike", body)
    writer.train("read", 1, 40, 80, 1.0, 2.0)
    writer.close()
    page = build_report(tmp_path / "run").decode()
    assert "rewound to read-000040.0" in page and "line c4 faint" in page.replace("thin ", "")
