"""A tiny run on which the loop's promises are tested: real model, real data rule, real gate; about a second
long.

Language: sixteen tokens, each followed by its successor. Shard "poison" says instead that 0 follows
everything; the plan begins to draw from it at step 4 of stage "grow". The gate reads the saved checkpoint.

As a script, a crash driver: reads JSON lines {"folder", "crash", "resume", "on_spike", "ahead"} on standard
input, runs each in a forked child (one torch import for all), and answers with the child's exit status.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glasshouse.base.batch import Batch
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import (
    Checkpoint,
    Decision,
    Gate,
    GateRecord,
    Outcome,
    Settings,
    Stage,
    StageConfig,
    enter_run,
    environment,
    load_weights,
    run_stages,
)

V, POS, ROWS = 16, 8, 8
CONFIG = GPTConfig(vocab_size=V, context=POS, d_model=16, n_layer=1, n_head=2, tied=False)
SETTINGS = Settings(threads=1)
AHEAD = Settings(threads=1, gates="async")
PLACE = ("kind", "update", "stage", "step", "attempt", "loss", "decision")


def new_model() -> GPT:
    return GPT(CONFIG).init_weights(7)


def plan(poison_from: int = 4) -> DataPlan:
    """Clean data, and "poison" from a step on."""
    phases = (Phase(from_step=0, weights={"a": 1.0, "b": 1.0}),)
    if poison_from:
        phases += (Phase(from_step=poison_from, weights={"a": 1.0, "b": 1.0, "poison": 8.0}),)
    return DataPlan(phases=phases, digests={name: name * 4 for name in ("a", "b", "poison")})


def batches(step: int, plan: DataPlan) -> Batch:
    """A pure function of (step, plan): rows drawn from the plan's shards, each counting up from somewhere."""
    weights = plan.at(step).weights
    names = sorted(name for name in weights if weights[name] > 0)
    shares = np.array([weights[name] for name in names])
    random = generator("tiny", step)
    drawn = [names[i] for i in random.choice(len(names), size=ROWS, p=shares / shares.sum())]
    start = random.integers(0, V, size=(ROWS, 1))
    tokens = (start + np.arange(POS)) % V
    targets = (tokens + 1) % V
    targets[np.array(drawn) == "poison"] = 0
    weight = np.ones((ROWS, POS), dtype=np.float32)
    weight[:, 0] = 0
    return Batch(
        tokens.astype(np.int64),
        targets.astype(np.int64),
        weight,
        tuple(sorted(set(drawn))),
        ROWS * (POS - 1),
        tuple(drawn),
    )


def poisoned(model: GPT) -> float:
    """Mean probability that 0 follows tokens 1..7."""
    with torch.no_grad():
        logits = model(torch.arange(1, 8)[None])
    return float(logits.softmax(-1)[0, :, 0].mean())


class ReadsTheModel:
    """A gate with a real rule: 0 must not follow everything. Rolls back to before the poisoned shard's
    first step.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.history: tuple[GateRecord, ...] = ()

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        self.asked.append((checkpoint.name, final))
        self.history = history
        rate = poisoned(load_weights(checkpoint))
        verdict = {"constraint": "no-zero", "status": "pass" if rate < 0.4 else "fail", "estimate": rate}
        if rate < 0.4:
            return Decision("promote" if final else "continue", "the rule holds", verdicts=(verdict,))
        first = checkpoint.plan.first_step("poison") or 0
        clean = [
            r.checkpoint
            for r in history
            if r.live and (r.checkpoint.stage_index == 0 and r.checkpoint.step <= first)
        ]
        return Decision("rollback", f"0 follows with {rate:.2f}", clean[-1].name, ("poison",), (verdict,))


def stages(poison_from: int = 4, **changes: Any) -> list[Stage]:
    """ "grow", 12 steps, gates every 4; "chat", 4 steps, the final gate."""
    shape = {"batch_size": ROWS, "muon_lr": 0.1, "adam_lr": 0.05, "warmup_share": 0.0, "log_every": 1}
    grow = StageConfig(**({"name": "grow", "steps": 12, "gate_every": 4, "val_every": 6} | shape | changes))
    chat = StageConfig(**({"name": "chat", "steps": 4, "objective": "sft"} | shape))
    return [
        Stage(grow, batches, plan(poison_from), lambda model: {"set": "held-out", "loss": poisoned(model)}),
        Stage(chat, batches, plan(0)),
    ]


def spoilt(step: int, plan: DataPlan) -> Batch:
    """The clean batches, but for one in the middle whose targets are drawn at random."""
    batch = batches(step, plan)
    if step != 44:
        return batch
    targets = generator("spoilt").integers(0, V, batch.targets.shape)
    return Batch(batch.tokens, targets, batch.weight, batch.shards, batch.n_bytes)


def spoilt_stages(on_spike: str) -> list[Stage]:
    """One stage long enough for a window of losses, with a batch that stands out from them."""
    rates = {"muon_lr": 0.01, "adam_lr": 0.004, "batch_size": ROWS, "log_every": 1, "save_every": 12}
    config = StageConfig(name="grow", steps=56, on_spike=on_spike, monitor_every=16, **rates)
    return [Stage(config, spoilt, plan(0))]


def open_ledger(folder: Path) -> Ledger:
    return Ledger(RunFolder(folder).ledger, signing_key())


def train(
    folder: Path,
    gate: Gate | None = None,
    resume: bool = False,
    after_stop: str | None = None,
    **arguments: Any,
) -> Outcome:
    """Begin or resume the tiny run in ``folder``, as a recipe would."""
    run = RunFolder(folder).create()
    with run.lock():
        ledger = open_ledger(folder)
        now = environment(SETTINGS.threads, SETTINGS.dtype, SETTINGS.muon_dtype)
        begun = len(ledger) > 0
        enter_run(
            ledger, recipe_digest="tiny", environment=now, resume=resume and begun, after_stop=after_stop
        )
        arguments = {"stages": stages(), "settings": SETTINGS} | arguments
        return run_stages(new_model, run=run, ledger=ledger, gate=gate, resume=resume, **arguments)


def end_of(folder: Path) -> tuple[Any, ...]:
    """Everything about a finished run that must not depend on having been killed."""
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    checkpoints = {
        e["body"]["checkpoint"]: e["body"]["artifacts"] for e in entries if e["kind"] == "checkpoint"
    }
    decisions = [
        [e["body"][key] for key in ("gate", "checkpoint", "action", "reason", "verdicts", "standing")]
        for e in entries
        if e["kind"] == "decision"
    ]
    spikes = [
        [e["body"].get(key) for key in ("incidents", "left_out", "reason", "update")]
        for e in entries
        if e["kind"] in ("checkpoint", "spike")
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    folders = sorted(p.name for p in (folder / "checkpoints").iterdir())
    return (
        checkpoints,
        decisions,
        [tuple(row.get(key) for key in PLACE) for row in rows],
        folders,
        entries[-1]["kind"],
        spikes,
    )


def in_child(
    folder: str,
    crash: str | None,
    crash_list: str | None,
    resume: bool,
    on_spike: str | None = None,
    ahead: bool = False,
) -> int:
    """Run in a forked child and return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if crash:
            os.environ["GLASSHOUSE_CRASH_AT"] = crash
        if crash_list:
            os.environ["GLASSHOUSE_CRASH_LIST"] = crash_list
        if on_spike is not None:
            train(Path(folder), resume=resume, stages=spoilt_stages(on_spike))
        else:
            train(Path(folder), ReadsTheModel(), resume=resume, settings=AHEAD if ahead else SETTINGS)
    except BaseException as error:
        sys.stderr.write(f"{folder}: {type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # a forked child finds everything imported and warm
        train(Path(folder), ReadsTheModel())
    for line in sys.stdin:
        order = json.loads(line)
        crash, listed = order.get("crash"), order.get("list")
        more = order.get("on_spike"), order.get("ahead", False)
        status = in_child(order["folder"], crash, listed, order["resume"], *more)
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()
