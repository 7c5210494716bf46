"""The evidence of a gate in files, its verdicts short in the ledger, and the export that promotion judges."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.run import RunFolder
from glasshouse.model.hf import save_hf
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Checkpoint, Decision, load_weights
from glasshouse.verify.past import CAUSES, digests_under

BULKY = ("evidence", "seconds", "coverage", "claim")
SHORT = ("suspects", *CAUSES)  # of the evidence: what later gates and the report's overview need


def export(run: RunFolder, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Path:
    """Write the Hugging Face folder that would be served, beside the run's own files."""
    folder = run.path / "export.candidate"
    shutil.rmtree(folder, ignore_errors=True)
    save_hf(load_weights(checkpoint), folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def settle_export(run: RunFolder, candidate: Path, decision: Decision) -> None:
    """Keep a promoted export, under its name; remove any other."""
    if decision.action != "promote":
        shutil.rmtree(candidate)
        return
    final = run.path / "export"
    shutil.rmtree(final, ignore_errors=True)
    candidate.rename(final)


def record(
    run: RunFolder,
    checkpoint: Checkpoint,
    index: int,
    decision: Decision,
    verdicts: Sequence[dict[str, Any]],
    seconds: float,
) -> Decision:
    """Write the verdicts with all evidence to a file; the ledger gets them short, with its digest and
    those of all files that checks left.
    """
    file = run.evals / f"gate-{index:03d}" / "verdicts.json"
    write_json(
        file,
        {
            "gate": index,
            "checkpoint": checkpoint.name,
            "stage": checkpoint.stage,
            "step": checkpoint.step,
            "update": checkpoint.update,
            "decision": decision.action,
            "to_checkpoint": decision.to_checkpoint,
            "drop_shards": list(decision.drop_shards),
            "densify": decision.densify,
            "reason": decision.reason,
            "seconds": round(seconds, 3),
            "verdicts": list(verdicts),
        },
    )
    artifacts = {**decision.artifacts, **digests_under(run, index)}
    artifacts[str(file.relative_to(run.path))] = sha256_file(file)
    if decision.action == "promote":
        exported = sorted((run.path / "export").iterdir())
        artifacts |= {str(f.relative_to(run.path)): sha256_file(f) for f in exported}
    return replace(decision, verdicts=tuple(shortened(v) for v in verdicts), artifacts=artifacts)


def shortened(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict for the ledger: everything but the bulky evidence, whose file the entry names by digest."""
    kept = {k: v for k, v in verdict.items() if k not in BULKY}
    coverage = verdict["coverage"]
    if coverage is not None:
        kept["coverage"] = {k: v for k, v in coverage.items() if k != "exempt"}
    evidence = verdict["evidence"]
    return kept | {k: evidence[k] for k in SHORT if k in evidence}


def summary(verdict: dict[str, Any]) -> str:
    """Estimate and bound in a few words."""
    side, value = next(iter(verdict["bound"].items()))
    if verdict["estimate"] is None:
        return "no estimate"
    shown = " and ".join(map(str, value)) if isinstance(value, list) else value
    return f"{verdict['estimate']:.3f} (bound: {side.replace('_', ' ')} {shown})"
