"""What verification costs: the gates' share of a run's training time, end to end.

    .venv/bin/python benchmarks/bench_gate.py --run runs/demo                   (make demo first)
    .venv/bin/python benchmarks/bench_gate.py --minutes 10                      (trains for ten minutes)

Of a finished run, wall time: seconds of every gate as the loop saw them (loading, checking, naming, tracing,
writing), against the seconds of training between them. Kept apart: gates at which nothing failed; all gates
of the run, among them those that named a failure, ran the black-box column and traced the data; promotion.
Computed, and said so: what gates would take of a run of any length that spends its whole budget. Budgets are
shares of training counted in tokens; what a token costs at a gate and in training is measured here.

With ``--minutes`` the demo's recipe is trained for so long, with so many times its steps and its gates where
the demo has them, every so many steps. Level lite is then run on the checkpoints of that same training, on
two a stage, since what is trained between two gates must pay for a verdict. Both clocks are read in the one
process that trains and checks: processor time, which hardly depends on what else a machine does, decides,
and wall time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from common import RESULTS, Quiet, row, write
from glasshouse.base.errors import RecipeError, Stopped
from glasshouse.base.run import RunFolder
from glasshouse.recipes import corpus
from glasshouse.recipes import run as running
from glasshouse.recipes.run import make_gate, open_run, tokens_per_step
from glasshouse.recipes.schema import Recipe, read_recipe
from glasshouse.train import Decision, GateRecord, load_weights, position
from glasshouse.train.checkpoint import from_ledger
from glasshouse.verify import ConstraintGate
from glasshouse.verify.cost import BACKWARD, LEVELS
from glasshouse.verify.recording import shortened

GOAL, LITE = 0.05, 0.01
DEMO_MINUTES = 3.0  # of training, in the demo
DEMO = "demo"


def main() -> None:
    """Read or make the run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--minutes", type=float, help="train anew for so long, and measure that")
    parser.add_argument("--keep", type=Path, help="folder for the run of --minutes; none: a temporary one")
    asked = parser.parse_args()
    if asked.minutes is None:
        merge(DEMO, finished(RunFolder(asked.run)))
        return
    with tempfile.TemporaryDirectory() as spare:
        merge(f"{asked.minutes:g} minutes", grown(asked.minutes, asked.keep or Path(spare) / "run"))


def merge(run: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of one run, keeping those of the others."""
    path = RESULTS / "gate.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    write("gate", [r for r in before if r.get("run", DEMO) != run] + [r | {"run": run} for r in rows])


def goal(share: float, most: float = GOAL) -> dict[str, Any]:
    """The goal's columns of a row."""
    return {"goal": f"<= {most:g}", "met": share <= most}


# -- a run made for it -------------------------------------------------------------------------------------


Judged = tuple[bool, bool, float, float]  # final, failed, seconds of processor time and of wall time
CLOCKS = ((2, "processor time"), (3, "wall time"))


@dataclass
class Clock:
    """Seconds of processor and of wall time of all of the loop, and what each gate took of them."""

    loop: tuple[float, float] = (0.0, 0.0)
    gates: list[Judged] = field(default_factory=list)


@contextmanager
def timed() -> Iterator[Clock]:
    """Both clocks round the training loop and round every gate in it."""
    clock, loop, gate = Clock(), running.run_stages, ConstraintGate.__call__

    def looped(*args: Any, **more: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return loop(*args, **more)
        finally:
            clock.loop = time.process_time() - cpu, time.perf_counter() - wall

    def judged(self: ConstraintGate, checkpoint: Any, history: Any, final: bool) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        decision = gate(self, checkpoint, history, final)
        failed = any(v["status"] == "fail" for v in decision.verdicts)
        clock.gates.append((final, failed, time.process_time() - cpu, time.perf_counter() - wall))
        return decision

    running.run_stages, ConstraintGate.__call__ = looped, judged  # type: ignore[assignment, method-assign]
    try:
        yield clock
    finally:
        running.run_stages, ConstraintGate.__call__ = loop, gate  # type: ignore[method-assign]


def longer(minutes: float, level: str) -> Recipe:
    """The demo's recipe with as many times its steps, at a level of cost."""
    text = (files("glasshouse.recipes") / "files" / "demo.toml").read_text(encoding="utf-8")
    data, times, gates = tomllib.loads(text), minutes / DEMO_MINUTES, 0
    for stage in data["stage"]:
        stage["steps"] = round(stage["steps"] * times)
        if "gate_every" in stage:
            if level == "lite":
                stage["gate_every"] = -(-stage["steps"] // 2)
            gates += -(-stage["steps"] // stage["gate_every"])
    data["gate"] |= {"level": level, "planned": max(data["gate"]["planned"], gates + 4)}
    return read_recipe(data, "demo.toml, longer")


def grown(minutes: float, folder: Path) -> list[dict[str, Any]]:
    """Rows of a run trained here and now."""
    name, lite = f"{minutes:g} minutes", list[Judged]()
    with timed() as clock, Quiet() as quiet:
        try:
            running.train(longer(minutes, "standard"), folder)
        except Stopped as problem:  # for a person; what was trained and checked until then still counts
            print(f"stopped: {problem}")
        try:
            lite += at_level_lite(longer(minutes, "lite"), RunFolder(folder))
        except RecipeError as problem:
            print(f"level lite is for longer runs: {problem}")
    training = {at: clock.loop[at - 2] - sum(g[at] for g in clock.gates) for at, _ in CLOCKS}
    rows = shares(f"{name}, standard", [g for g in clock.gates if not g[0]], training, GOAL)
    rows += shares(f"{name}, lite", lite, training, LITE) if lite else []
    for at, what in CLOCKS:
        final = sum(g[at] for g in clock.gates if g[0]) / training[at]
        rows.append(
            row(f"{name}: promotion (full sweep), share of training's {what}", final, goal="reported")
        )
        rows.append(row(f"{name}: training, seconds of {what}", training[at], goal="reported"))
    print(f"others took {quiet.foreign or 0:.0%} of the machine")
    return [r | {"foreign": quiet.foreign} for r in rows]


def shares(name: str, gates: list[Judged], training: dict[int, float], most: float) -> list[dict[str, Any]]:
    """Of gates: had none of them failed, and as they were. Processor time is held against the goal."""
    sound, rows = [g for g in gates if not g[1]], []
    print(f"{name}: {len(gates)} gates, {len(gates) - len(sound)} with a failure")
    for at, what in CLOCKS:
        routine = len(gates) * sum(g[at] for g in sound) / max(1, len(sound))
        for part, seconds in (("without a failure", routine), ("all", sum(g[at] for g in gates))):
            share = seconds / training[at]
            met = goal(share, most) if at == CLOCKS[0][0] else {"goal": "reported"}
            rows.append(row(f"{name}: gates, {part}, share of training's {what}", share, **met))
    return [r | {"gates": len(gates), "failed": len(gates) - len(sound)} for r in rows]


def at_level_lite(recipe: Recipe, run: RunFolder) -> Iterator[Judged]:
    """The gates of ``recipe`` on a finished run's checkpoints, each on the first at or after its step."""
    entries = [json.loads(line) for line in run.ledger.read_text(encoding="utf-8").splitlines()]
    at, every = position(entries), {s.name: s.gate_every for s in recipe.stage if s.gate_every}
    history: tuple[GateRecord, ...] = ()
    with tempfile.TemporaryDirectory() as spare:
        made = make_gate(recipe, run, corpus.reopen(run), entries[0]["body"]["environment"]["dtype"])
        gate = replace(made, run=RunFolder(Path(spare)))
        due = dict(every)
        for mark in (at.marks[name] for name in at.lineage()):
            if mark.step < due.get(mark.stage, mark.step + 1) or mark.last:
                continue
            due[mark.stage] = mark.step + every[mark.stage]
            checkpoint = from_ledger(run, mark.body)
            cpu, wall = time.process_time(), time.perf_counter()
            verdicts = gate.examine(load_weights(checkpoint), checkpoint, history, len(history), False)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            said = tuple(shortened(v) for v in verdicts)
            history += (GateRecord(checkpoint, Decision("continue", "", verdicts=said), True, len(history)),)
            print(
                f"lite at {checkpoint.name}: "
                + ", ".join(f"{v['constraint']} {v['status']}" for v in verdicts)
            )
            yield False, any(v["status"] == "fail" for v in verdicts), cpu, wall


# -- a finished run ----------------------------------------------------------------------------------------


def finished(run: RunFolder) -> list[dict[str, Any]]:
    """Rows of a finished run, from its ledger and the files of its gates."""
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
    return rows + any_length(run, at, sound, training)


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
