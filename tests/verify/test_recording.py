"""The evidence stands in files; the ledger has it short, with their digests."""

from __future__ import annotations

import json
from pathlib import Path

from glasshouse.base.digest import sha256_file
from glasshouse.base.run import RunFolder
from glasshouse.train import Decision
from glasshouse.verify.recording import record
from verify.test_gate import verdict
from verify.test_rollback import at


def test_what_is_recorded_is_a_file_named_by_digest_and_short_verdicts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    evidence = {"word": "harbour", "suspects": ["harbour"], "examples": ["long"] * 99}
    coverage = {"share": 1.0, "exempt": [{"word": "soak", "reason": "meaning"}]}
    full = verdict("fail", evidence=evidence, coverage=coverage, seconds=1.0, claim="c")
    decision = record(run, at(2, 80), 7, Decision("hold", "held"), [full], 1.5)
    ((name, digest),) = decision.artifacts.items()
    file = run.path / name
    assert name == "evals/gate-007/verdicts.json"
    assert (
        json.loads(file.read_text(encoding="utf-8"))["verdicts"][0]["evidence"]["examples"] == ["long"] * 99
    )

    assert digest == sha256_file(file)
    (short,) = decision.verdicts
    assert "evidence" not in short and short["suspects"] == ["harbour"] and short["word"] == "harbour"
    assert short["coverage"] == {"share": 1.0}
