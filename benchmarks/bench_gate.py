"""What verification costs: the gates' share of a finished run's time, gates and promotion apart.

    .venv/bin/python benchmarks/bench_gate.py --run runs/demo      (make demo first)

Prints a table and writes `benchmarks/results/gate.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from glasshouse.train import position


def main() -> None:
    """Read the run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = parser.parse_args().run
    if not (run / "ledger.jsonl").is_file():
        sys.exit(f"{run} holds no run; `make demo` makes one")
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    at = position(entries)
    gates, promotion, by_constraint = 0.0, 0.0, dict[str, float]()
    for body in (e["body"] for e in entries if e["kind"] == "decision"):
        found = json.loads((run / "evals" / f"gate-{body['gate']:03d}" / "verdicts.json").read_text())
        if body["final"]:
            promotion += found["seconds"]
        else:
            gates += found["seconds"]
            for v in found["verdicts"]:
                by_constraint[v["constraint"]] = by_constraint.get(v["constraint"], 0.0) + v["seconds"]
    training = at.elapsed_s - gates - promotion
    print(f"{'part':34s} {'seconds':>9s} {'of training':>12s}")
    for name, seconds in [("training", training), ("gates", gates), ("promotion (full sweep)", promotion)]:
        print(f"{name:34s} {seconds:9.1f} {seconds / training:12.1%}")
    for name, seconds in sorted(by_constraint.items(), key=lambda c: -c[1]):
        print(f"  {name:32s} {seconds:9.1f} {seconds / training:12.1%}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    same = {
        "peer": None,
        "peer_value": None,
        "goal": "reported",
        "met": True,
        "seeds": [entries[0]["body"]["seed"]],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit,
    }
    rows = [
        {"metric": "gates' share of training time", "value": gates / training, **same},
        {"metric": "promotion's share of training time", "value": promotion / training, **same},
    ]
    out = Path(__file__).parent / "results" / "gate.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
