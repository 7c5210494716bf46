from __future__ import annotations

import json
from pathlib import Path

import pytest

from glasshouse.base.errors import CheckpointError
from glasshouse.train.metrics import MetricsLog


def test_rows_after_the_recorded_size_are_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append({"step": 1})
    recorded = log.sync()
    log.append({"step": 2})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    again = MetricsLog(path, recorded)
    again.append({"step": 2, "name": "ü"})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "name": "ü"},
    ]


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.append({"loss": float("nan"), "bpb": float("inf")})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"loss": None, "bpb": None}


def test_a_file_shorter_than_the_ledger_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m.jsonl has 0 bytes, but the ledger recorded 7"):
        MetricsLog(tmp_path / "m.jsonl", 7)
