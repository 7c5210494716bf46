"""One loop for any objective: steps, checkpoints, gates, rollbacks, and resuming after anything.

`run_stages` asks `position` where the ledger says the run stands and does the next thing, until the run is
finished. It keeps no state that is not in a checkpoint or the ledger, so a killed run continues bit for bit:
a batch is a function of (step, plan), the rate of the step, and nothing is random after initialisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glasshouse.base.crash import crash_point
from glasshouse.base.errors import CheckpointError, Interrupted, Stopped, UsageError
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.train import checkpoint as saving
from glasshouse.train.allocator import keep_freed_memory
from glasshouse.train.config import Stage
from glasshouse.train.decisions import decision_body, history
from glasshouse.train.fold import Position, position
from glasshouse.train.gate import Checkpoint, Gate, ask
from glasshouse.train.metrics import MetricsLog
from glasshouse.train.objective import OBJECTIVES, Objective, autocast
from glasshouse.train.progress import Progress
from glasshouse.train.signals import Signals
from glasshouse.train.stability import REWIND_STEPS
from glasshouse.train.step import device_of
from glasshouse.train.trainee import LANGUAGE, Trainee
from glasshouse.train.update import Done, Updater

MOST_INCIDENTS = 64  # spikes that one ledger entry lists; the metrics have all
REWOUND = "rewound"  # no checkpoint is called so: the state in memory is to be thrown away


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: part of the run's identity, see `identity`."""

    dtype: str = "fp32"  # "fp32" | "bf16" | "fp8": matrix products of forward and backward
    muon_dtype: str = "fp32"  # "fp32" | "bf16": Muon's orthogonalisation
    threads: int = 1
    compile: str = "off"  # "off" | "on": compiled blocks in training steps
    device: str = "cpu"  # where the model trains; gates read checkpoints on their own
    max_rollbacks: int = 3  # this many rollback decisions stop the run for a person
    resume_command: str = "the same command with --resume"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``promoted`` is False when the final gate held the checkpoint or none was given."""

    promoted: bool
    checkpoint: Checkpoint
    reason: str
    rollbacks: int
    gates: int
    seconds: float


def run_stages(
    model: Callable[[], nn.Module],
    stages: Sequence[Stage],
    *,
    run: RunFolder,
    ledger: Ledger,
    gate: Gate | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    tokenizer_file: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    objectives: dict[str, Objective] | None = None,
    trainee: Trainee = LANGUAGE,
) -> Outcome:
    """Train through ``stages`` in order, from wherever the ledger says the run is; return how it ended.

    ``model()`` builds the initial model, the same one on every call (`GPT(config).init_weights(seed)`);
    ``trainee`` says how it trains if it is no GPT, and ``objectives`` adds to `OBJECTIVES` by name. The
    caller holds ``run.lock()`` and has written or checked the ledger's "run" entry (`identity.enter_run`).
    Raises Stopped (the gate, a spike, or too many rollbacks ask for a person), Interrupted (Ctrl-C; a
    checkpoint was saved), TrainingError (updates in a row not finite, out of memory), CheckpointError,
    DiskError, and UsageError if the run has checkpoints already and ``resume`` is not set. Whatever is
    raised, the run can be resumed from its last checkpoint.
    """
    settings = settings or Settings()
    if not stages or len({stage.name for stage in stages}) != len(stages):
        raise UsageError("a run needs at least one stage, and every stage a name of its own")
    if not resume and position(ledger.entries()).phase != "new":
        raise UsageError(f"{run.path} holds a run already: add --resume to go on, or name another run folder")
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    with Signals() as signals:
        running = _Run(
            model().to(settings.device), tuple(stages), run.create(), ledger, gate, seed, settings, signals
        )
        running.tokenizer_file, running.progress = tokenizer_file, progress or Progress()
        running.objectives, running.trainee = {**OBJECTIVES, **(objectives or {})}, trainee
        try:
            for stage in stages:
                running.objective(stage)  # before anything is trained
            return running.to_the_end()
        except KeyboardInterrupt:
            raise running.interrupted() from None
        finally:
            running.close()


@dataclass
class _Run:
    """The working parts. Nothing here outlives the process; what must is in checkpoints and ledger."""

    model: Any
    stages: tuple[Stage, ...]
    run: RunFolder
    ledger: Ledger
    gate: Gate | None
    seed: int
    settings: Settings
    signals: Signals
    tokenizer_file: Path | None = None
    progress: Progress = field(default_factory=Progress)
    objectives: dict[str, Objective] = field(default_factory=dict)
    trainee: Trainee = LANGUAGE
    updates: Updater | None = None
    live: str | None = None  # the checkpoint whose state model and updates come from; None: not loaded yet
    incidents: list[dict[str, Any]] = field(default_factory=list)  # spikes since then

    def __post_init__(self) -> None:
        at = position(self.ledger.entries())
        saving.sweep(self.run, at.marks)
        self.metrics = MetricsLog(self.run.metrics, at.metrics_bytes)
        self.began = time.perf_counter() - at.elapsed_s  # the clock stands still while no process runs

    def close(self) -> None:
        self.metrics.close()
        self.progress.close()

    def elapsed(self) -> float:
        return round(time.perf_counter() - self.began, 3)

    def interrupted(self) -> Interrupted:
        at = position(self.ledger.entries())
        where = f"; everything up to {at.head} is saved" if at.head else ""
        return Interrupted(f"interrupted{where}. Go on with: {self.settings.resume_command}")

    def to_the_end(self) -> Outcome:
        """Do the next thing that the ledger asks for, until it asks for nothing."""
        while True:
            at = position(self.ledger.entries())
            if self.signals.asked:
                raise self.interrupted()
            match at.phase:
                case "new":
                    self.save(at, 0, 0, at.update, why="start")
                case "train":
                    self.train(at)
                case "gate":
                    self.judge(at)
                case "stopped":
                    raise self.stopped(at)
                case "decided":
                    self.ledger.append(
                        "finish", {"checkpoint": at.head, "promoted": at.promoted, "reason": at.reason}
                    )
                    crash_point("finish.after-ledger")
                case "finished":
                    checkpoint = saving.from_ledger(self.run, at.at_head.body)
                    return Outcome(at.promoted, checkpoint, at.reason, at.rollbacks, at.gates, at.elapsed_s)

    # -- training ------------------------------------------------------------------------------------------

    def train(self, at: Position) -> None:
        """Train from the head to the next checkpoint that is due (or to a Ctrl-C) and save it."""
        index, step = self.place(at)
        stage = self.stages[index]
        config, plan = stage.config, at.plan_for(index, stage.plan)
        updates = self.ready(at, index, step)
        first, until = step, self.next_save(index, step)
        self.incidents = []
        self.progress.stage(index, len(self.stages), config, step)
        started, since, tokens = time.perf_counter(), step, 0.0
        while step < until and not self.signals.asked:
            crash_point("step")
            done = None if at.left_out(index, step) else updates(step, plan, self.live)
            step += 1
            updates.optimizers.average.update(step)
            ends, update = step == config.steps, at.update + step - first
            if done is not None:
                tokens += done.loss.metrics.get("tokens", 0.0)
                self.look_at(done, self.row(at, "spike", index, step, update))
                if done.action in ("rewind", "stop"):
                    self.go_back(at, done, index, step, update)
                    return
                if step % config.log_every == 0 or ends:
                    spent, started = time.perf_counter() - started, time.perf_counter()
                    speed = {"tokens_per_s": round(tokens / spent, 1)}
                    speed["seconds_per_step"] = spent / (step - since)
                    self.log(self.row(at, "train", index, step, update) | self.numbers(done) | speed)
                    since, tokens = step, 0.0
            if ends or (config.val_every and step % config.val_every == 0):
                paused = time.perf_counter()
                self.validate(stage, self.row(at, "val", index, step, update))
                started += time.perf_counter() - paused
        if step > first:
            self.save(at, index, step, at.update + step - first, "step" if step == until else "interrupt")

    def look_at(self, done: Done, row: dict[str, Any]) -> None:
        """Write down what a monitor saw, and a spike with what is done about it."""
        if done.seen is not None:
            self.log(row | {"kind": "monitor"} | done.seen)
        if done.spike is not None:
            found = {**done.spike.record(), "action": done.action, "shards": list(done.shards)}
            self.log(row | found)
            self.incidents.append({"step": row["step"], **found})

    def go_back(self, at: Position, done: Done, index: int, step: int, update: int) -> None:
        """Ledger that the head is trained again without the batches behind a spike, or only after a person
        looked. ``step`` counts the batch that showed it.
        """
        action, reason = done.action, done.reason
        if action == "rewind" and at.rewinds + 1 >= self.settings.max_rollbacks:
            action, reason = "stop", f"{reason}; {at.rewinds + 1} rewinds stop a run for a person"
        start = at.at_head.step if at.at_head.stage_index == index else 0
        body = {
            "checkpoint": at.head,
            "action": action,
            "stage": self.stages[index].name,
            "stage_index": index,
            "step": step,
            "update": update,
            # A step is named by how many were done before it: the last is the one that showed the spike.
            "left_out": [max(start, step - REWIND_STEPS), step - 1],
            "reason": reason,
            "incidents": self.incidents[:MOST_INCIDENTS],
            "metrics_bytes": self.metrics.sync(),
            "elapsed_s": self.elapsed(),
        }
        crash_point("spike.before-ledger")
        self.ledger.append("spike", body)
        self.live = REWOUND
        self.progress.note(f"{reason}: {action}")
        crash_point("spike.after-ledger")

    def place(self, at: Position) -> tuple[int, int]:
        """Stage index and step from which to train: the end of one stage is the start of the next."""
        head = at.at_head
        if head.stage_index >= len(self.stages) or head.stage != self.stages[head.stage_index].name:
            raise UsageError(
                f"the run's stage '{head.stage}' is not in these stages; resume with its own recipe"
            )
        if head.step == self.stages[head.stage_index].config.steps:
            return head.stage_index + 1, 0
        return head.stage_index, head.step

    def ready(self, at: Position, index: int, step: int) -> Updater:
        """Bring model, optimisers and detector to the head's state, unless they hold it. They are new in a
        new stage.
        """
        resumed, rolled_back = self.live is None, self.live not in (None, at.head)
        if step == 0 or self.updates is None or self.live != at.head:
            stage, settings = self.stages[index], self.settings
            self.trainee.prepare(self.model, settings.dtype, settings.compile)
            self.updates = Updater(
                self.model, stage, self.objective(stage), settings.dtype, settings.muon_dtype, self.trainee
            )
        if resumed or rolled_back:
            kind = "rollback" if rolled_back else "resume"
            crash_point(f"{kind}.before-load")
            head = saving.from_ledger(self.run, at.at_head.body)
            self.check_plan(at, head)
            updates = self.updates if step > 0 else None
            saving.load_checkpoint(
                head,
                self.model,
                updates.optimizers if updates else None,
                updates.detector if updates else None,
                self.trainee.read,
            )
            self.live = at.head
            crash_point(f"{kind}.after-load")
        self.model.train()
        return self.updates

    def objective(self, stage: Stage) -> Objective:
        """The stage's objective. UsageError if nobody supplied it."""
        name = stage.config.objective
        if name not in self.objectives:
            raise UsageError(
                f"stage '{stage.name}': objective '{name}' is none of {', '.join(sorted(self.objectives))}; "
                "whoever trains with it passes it to run_stages(objectives=...)"
            )
        objective = self.objectives[name]
        if stage.config.z_loss:
            objective = partial(objective, z_loss=stage.config.z_loss)  # type: ignore[call-arg]
        return objective

    def check_plan(self, at: Position, head: Checkpoint) -> None:
        """The batches of a resumed run must be those that the ledger promised. A rolled-back head's plan
        may only have lost shards since, so it is compared by the shards' digests.
        """
        now = self.stages[head.stage_index].plan
        if dict(head.plan.digests) != dict(now.digests):
            raise CheckpointError(
                f"{head.path}: written with other data shards than stage '{head.stage}' has now; "
                "restore the run's data folder, or start a new run"
            )

    def next_save(self, index: int, step: int) -> int:
        """The next step after ``step`` at which a checkpoint is due."""
        config = self.stages[index].config
        every = [n for n in (config.gate_every if self.gate else 0, config.save_every) if n]
        return min([config.steps, *(step - step % n + n for n in every)])

    def validate(self, stage: Stage, row: dict[str, Any]) -> None:
        if stage.validate is None:
            return
        self.model.eval()
        with torch.no_grad(), autocast(self.settings.dtype, device_of(self.model)):
            found = stage.validate(self.model)
        self.model.train()
        for numbers in [found] if isinstance(found, dict) else found:
            self.log(row | numbers)

    # -- saving and judging --------------------------------------------------------------------------------

    def save(self, at: Position, index: int, step: int, update: int, why: str) -> None:
        """Save a checkpoint, then ledger it; decide here whether a gate is due at it."""
        stage = self.stages[index]
        name = saving.checkpoint_name(stage.name, step, at.attempt)
        ends = step == stage.config.steps
        last = ends and index == len(self.stages) - 1
        every = stage.config.gate_every
        due = self.gate is not None and step > 0 and (last or (every > 0 and (ends or step % every == 0)))
        place = {
            "stage": stage.name,
            "stage_index": index,
            "step": step,
            "attempt": at.attempt,
            "update": update,
        }
        plan = at.plan_for(index, stage.plan).model_dump(mode="json")
        if self.updates is not None:
            self.updates.check_finite(self.live)
        artifacts = saving.write_checkpoint(
            self.run,
            name,
            self.model,
            self.updates.optimizers if self.updates else None,
            self.tokenizer_file,
            {**place, "plan": plan, "seed": self.seed},
            self.updates.detector if self.updates else None,
            self.trainee.write,
        )
        body = {
            **place,
            "checkpoint": name,
            "parent": at.head,
            "why": "end" if ends else "gate" if due else why,
            "gate": at.gates if due else None,
            "last": last,
            "plan": plan,
            "digest": saving.digest_of_artifacts(artifacts),
            "metrics_bytes": self.metrics.sync(),
            "elapsed_s": self.elapsed(),
            "artifacts": artifacts,
        }
        if self.incidents:
            body |= {"incidents": self.incidents[:MOST_INCIDENTS], "n_incidents": len(self.incidents)}
        self.ledger.append("checkpoint", body)
        self.live, self.incidents = name, []
        self.progress.note(f"saved {name}")
        crash_point("checkpoint.after-ledger")

    def judge(self, at: Position) -> None:
        """Ask the gate about the head and ledger what it decided; `position` does the rest."""
        if self.gate is None:
            raise UsageError(
                f"a gate is due at {at.head}, but none was given; resume with the run's own constraints"
            )
        mark, checkpoint = at.at_head, saving.from_ledger(self.run, at.at_head.body)
        shards = {shard for stage in self.stages for shard in stage.plan.shards}
        self.progress.gate(mark.name, at.gates)
        crash_point("gate.before")
        started = time.perf_counter()
        with self.signals.leaving_at_once():
            decision = ask(self.gate, checkpoint, history(self.run, at), mark.last, shards)
        # A gate may have changed it, and the run's bits depend on it.
        torch.set_num_threads(self.settings.threads)
        seconds = round(time.perf_counter() - started, 3)
        crash_point("gate.after")
        body = decision_body(at, decision, self.stages, self.settings.max_rollbacks)
        row = self.row(at, "gate", mark.stage_index, mark.step, at.update)
        said = {"gate": at.gates, "checkpoint": mark.name, "seconds": seconds, "decision": body["action"]}
        self.log(row | said | {"reason": body["reason"]})
        recorded = {"seconds": seconds, "metrics_bytes": self.metrics.sync(), "elapsed_s": self.elapsed()}
        crash_point("decision.before-ledger")
        self.ledger.append("decision", body | recorded)
        crash_point("decision.after-ledger")

    def stopped(self, at: Position) -> Stopped:
        if self.ledger.entries()[-1]["kind"] != "stop":
            self.ledger.append("stop", {"checkpoint": at.head, "reason": at.reason})
        return Stopped(
            f"the run stopped at {at.head} and waits for a person: {at.reason}. Read the report; then start "
            "a new run, or go on with an explicit override, which is recorded in the ledger"
        )

    # -- rows ----------------------------------------------------------------------------------------------

    def row(self, at: Position, kind: str, index: int, step: int, update: int) -> dict[str, Any]:
        place = {"stage": self.stages[index].name, "step": step, "attempt": at.attempt, "kind": kind}
        return {"t": self.elapsed(), "update": update, **place}

    def log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.progress.row(row)

    def numbers(self, done: Done) -> dict[str, Any]:
        """A row's numbers of one update."""
        loss = done.loss
        numbers = {"loss": float(loss.total.detach()), **self.trainee.numbers(loss)}
        numbers |= {"lr": done.lr, "grad_norm": done.norm}
        if len(loss.parts) > 1:
            numbers |= {f"loss/{name}": float(value.detach()) for name, value in loss.parts.items()}
        return numbers
