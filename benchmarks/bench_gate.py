"""What verification costs: the gates' share of a finished run's training time, end to end.

    .venv/bin/python benchmarks/bench_gate.py --run runs/demo      (make demo first)

Measured: seconds of every gate, as the loop saw them (loading, checking, naming, tracing, writing), against
the seconds of training between them. Kept apart: gates at which nothing failed; the gates of the whole run,
among them those that named a failure, ran the black-box column and traced the data; and promotion.

Computed, and said so: what gates would take of a run of any length that spends its whole budget. Budgets are
shares of training counted in tokens; what a token costs at a gate and in training is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import row, write
from glasshouse.base.run import RunFolder
from glasshouse.recipes import corpus
from glasshouse.recipes.run import open_run, tokens_per_step
from glasshouse.train import position
from glasshouse.verify.cost import BACKWARD, LEVELS

GOAL, LITE = 0.05, 0.01


def main() -> None:
    """Read the run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = RunFolder(parser.parse_args().run)
    if not run.ledger.is_file():
        sys.exit(f"{run.path} holds no run; `make demo` makes one")
    entries = [json.loads(line) for line in run.ledger.read_text(encoding="utf-8").splitlines()]
    gates = [gate_of(run, e["body"]) for e in entries if e["kind"] == "decision"]
    checked = [g for g in gates if not g["final"]]
    at = position(entries)
    total = sum(g["seconds"] for g in checked)
    promotion = sum(g["seconds"] for g in gates if g["final"])
    training = at.elapsed_s - total - promotion
    sound = [g for g in checked if not g["failed"]]
    # Had nothing failed, the other gates would have taken what the sound ones did, on average.
    routine = len(checked) * sum(g["seconds"] for g in sound) / max(1, len(sound))
    rows = [
        row(
            "gates without a failure, share of training time", routine / training, **goal(routine / training)
        ),
        row("all gates, share of training time", total / training, **goal(total / training)),
        row("promotion (full sweep), share of training time", promotion / training, goal="reported"),
        row("training, seconds", training, goal="reported"),
    ]
    for name, seconds in sorted(by_constraint(checked).items(), key=lambda c: -c[1]):
        rows.append(row(f"{name}, share of training time", seconds / training, goal="reported"))
    rows += any_length(run, at, sound, training)
    write("gate", rows)


def goal(share: float, most: float = GOAL) -> dict[str, Any]:
    """The goal's columns of a row."""
    return {"goal": f"<= {most:g}", "met": share <= most}


def gate_of(run: RunFolder, body: dict[str, Any]) -> dict[str, Any]:
    """One gate: its seconds, its verdicts, whether anything failed."""
    file = run.evals / f"gate-{body['gate']:03d}" / "verdicts.json"
    verdicts = json.loads(file.read_text(encoding="utf-8"))["verdicts"]
    failed = any(v["status"] == "fail" for v in verdicts)
    return {"seconds": body["seconds"], "final": body["final"], "failed": failed, "verdicts": verdicts}


def by_constraint(gates: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by constraint, and what no constraint took: loading, tracing, writing."""
    found: dict[str, float] = {}
    for gate in gates:
        for v in gate["verdicts"]:
            found[v["constraint"]] = found.get(v["constraint"], 0.0) + v["seconds"]
        rest = gate["seconds"] - sum(v["seconds"] for v in gate["verdicts"])
        name = "tracing, loading, writing" if gate["failed"] else "loading, writing"
        found[name] = found.get(name, 0.0) + rest
    return found


def any_length(run: RunFolder, at: Any, sound: list[dict[str, Any]], training: float) -> list[dict[str, Any]]:
    """Share of time of gates that spend all a level allows, from the cost of a token here and there."""
    recipe = open_run(run.path)
    per_step, tokens, before = tokens_per_step(recipe, corpus.reopen(run)), 0.0, 0
    for mark in sorted(at.marks.values(), key=lambda m: m.update):
        tokens += (mark.update - before) * per_step[mark.stage]
        before = mark.update
    asked = sum(v["passes"] * v.get("pass_tokens", 0.0) for g in sound for v in g["verdicts"])
    if not asked:
        return []
    at_gates = sum(g["seconds"] for g in sound) / asked
    in_training = training / (BACKWARD * tokens)
    rows = [row("a token at gates in tokens of training's forward", at_gates / in_training, goal="reported")]
    for level, most in (("lite", LITE), ("standard", GOAL)):
        share = (LEVELS[level] or 0.0) * at_gates / in_training  # type: ignore[index]
        name = f"level {level}, all of it spent, share of training time (computed)"
        rows.append(row(name, share, **goal(share, most)))
    return rows


if __name__ == "__main__":
    main()
