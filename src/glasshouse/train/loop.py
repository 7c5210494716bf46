"""One loop for any objective: steps, checkpoints, gates, rollbacks, and resuming after anything.

`run_stages` asks `position` where the ledger says the run stands and does the next thing, until the run is
finished. It keeps no state that is not in a checkpoint or the ledger, so a killed run continues bit for bit:
a batch is a function of (step, plan), the rate of the step, and nothing is random after initialisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glasshouse.base.crash import crash_point
from glasshouse.base.errors import CheckpointError, GlasshouseError, Halt, Interrupted, Stopped, UsageError
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.train import checkpoint as saving
from glasshouse.train.allocator import keep_freed_memory
from glasshouse.train.config import Stage
from glasshouse.train.elsewhere import Elsewhere, GateMaker
from glasshouse.train.fold import Position, position
from glasshouse.train.gate import Checkpoint, Gate
from glasshouse.train.interventions import in_force, intervened, without_dropped
from glasshouse.train.interventions_config import Route
from glasshouse.train.judge import Judge
from glasshouse.train.objective import OBJECTIVES, Objective, autocast
from glasshouse.train.progress import Progress
from glasshouse.train.records import Records
from glasshouse.train.routing import remove_blocks, route_of, without_blocks
from glasshouse.train.settings import Outcome, Settings, worker_for
from glasshouse.train.signals import Signals
from glasshouse.train.stability import REWIND_STEPS
from glasshouse.train.step import device_of
from glasshouse.train.trainee import LANGUAGE, Trainee
from glasshouse.train.update import Done, Updater

MOST_INCIDENTS = 64  # spikes that one ledger entry lists; the metrics have all
REWOUND = "rewound"  # no checkpoint is called so: the state in memory is to be thrown away


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
    make_gate: GateMaker | None = None,
) -> Outcome:
    """Train through ``stages`` in order, from wherever the ledger says the run is; return how it ended.

    ``model()`` builds the initial model, the same one on every call (`GPT(config).init_weights(seed)`);
    ``trainee`` says how it trains if it is no GPT, and ``objectives`` adds to `OBJECTIVES` by name.
    ``make_gate()`` makes the same gate in another process (``settings.gates`` "async"); None sends it. The
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
    stages = tuple(without_dropped(stage) for stage in stages)
    with Signals() as signals:
        running = _Run(
            model().to(settings.device),
            stages,
            run.create(),
            ledger,
            gate,
            seed,
            settings,
            signals,
            tokenizer_file,
            progress or Progress(),
            {**OBJECTIVES, **(objectives or {})},
            trainee,
            worker_for(gate, make_gate, settings),
        )
        try:
            for stage in stages:  # before anything is trained
                running.objective(stage, ())
                route_of(in_force(stage.config, ()), running.model)
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
    tokenizer_file: Path | None
    progress: Progress
    objectives: dict[str, Objective]
    trainee: Trainee
    elsewhere: Elsewhere | None
    updates: Updater | None = None
    live: str | None = None  # the checkpoint whose state model and updates come from; None: not loaded yet
    incidents: list[dict[str, Any]] = field(default_factory=list)  # spikes since then

    def __post_init__(self) -> None:
        at = position(self.ledger.entries())
        saving.sweep(self.run, at.marks)
        self.records = Records(self.run, at, self.stages, self.progress)
        self.judge = Judge(
            self.gate,
            self.elsewhere,
            self.run,
            self.ledger,
            self.stages,
            self.records,
            self.signals,
            self.settings.threads,
            self.settings.max_rollbacks,
        )

    def close(self) -> None:
        self.records.close()
        self.judge.close()

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
                case "train" if self.settings.more and self.place(at)[0] >= len(self.stages):
                    checkpoint = saving.from_ledger(self.run, at.at_head.body)
                    return Outcome(False, checkpoint, at.reason, at.rollbacks, at.gates, at.elapsed_s)
                case "train":
                    self.train(at)
                case "gate" if self.judge.elsewhere is not None and not at.at_head.last:
                    self.train_ahead(at)
                case "gate":
                    self.judge.here(at)
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
        """Train from the head to the next checkpoint that is due (or to a Ctrl-C) and save it.

        While a gate judges the head elsewhere, nothing is written down before its decision is; if that is to
        go elsewhere, what was trained meanwhile is thrown away.
        """
        index, step = self.place(at)
        stage = self.stages[index]
        config, plan = stage.config, at.plan_for(index, stage.plan)
        updates = self.ready(at, index, step)
        first, until = step, self.next_save(at, index, step)
        self.incidents = []
        self.records.progress.stage(index, len(self.stages), config, step)
        started, since, tokens = time.perf_counter(), step, 0.0
        while step < until and not self.signals.asked:
            crash_point("step")
            if self.judge.answered:
                if (settled := self.standing(at, index, first, step)) is None:
                    return
                at, until = settled, self.next_save(settled, index, first)
                continue  # decisions may ask for a checkpoint right here
            try:
                done = None if at.left_out(index, step) else updates(step, plan, self.live)
            except Halt as limit:
                return self.halt(at, index, first, step, limit)
            step += 1
            updates.optimizers.average.update(step)
            ends, update = step == config.steps, at.update + step - first
            if done is not None:
                tokens += done.loss.metrics.get("tokens", 0.0)
                self.look_at(done, self.records.row(at, "spike", index, step, update))
                if done.action in ("rewind", "stop"):
                    if (settled := self.standing(at, index, first, step)) is not None:
                        self.go_back(settled, done, index, step, update)
                    return
                if step % config.log_every == 0 or ends:
                    spent, started = time.perf_counter() - started, time.perf_counter()
                    speed = {"tokens_per_s": round(tokens / spent, 1)}
                    speed["seconds_per_step"] = spent / (step - since)
                    self.records.log(
                        self.records.row(at, "train", index, step, update) | self.numbers(done) | speed
                    )
                    since, tokens = step, 0.0
            if ends or (config.val_every and step % config.val_every == 0):
                paused = time.perf_counter()
                self.validate(stage, self.records.row(at, "val", index, step, update))
                started += time.perf_counter() - paused
        if self.judge.judging and self.signals.asked and not self.judge.answered:
            return  # leaving: the gate is asked again when the run is resumed, and this trained again
        if step > first and (settled := self.standing(at, index, first, step)) is not None:
            reached = step == self.next_save(settled, index, first)
            self.save(settled, index, step, at.update + step - first, "step" if reached else "interrupt")

    def halt(self, at: Position, index: int, first: int, step: int, limit: Halt) -> None:
        """Save what there is before the update that passed a limit, ledger the stop, and raise ``limit``."""
        if (settled := self.standing(at, index, first, step)) is None:
            return
        if step > first:
            self.save(settled, index, step, at.update + step - first, "halt")
        self.ledger.append("stop", {"checkpoint": self.live, "reason": str(limit)})
        raise limit

    def look_at(self, done: Done, row: dict[str, Any]) -> None:
        """Write down what a monitor saw, and a spike with what is done about it."""
        if done.seen is not None:
            self.records.log(row | {"kind": "monitor"} | done.seen)
        if done.spike is not None:
            found = {**done.spike.record(), "action": done.action, "shards": list(done.shards)}
            self.records.log(row | found)
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
            **self.records.sync(),
        }
        crash_point("spike.before-ledger")
        self.ledger.append("spike", body)
        self.live = REWOUND
        self.records.progress.note(f"{reason}: {action}")
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
                self.model,
                stage,
                self.objective(stage, at.repairs),
                settings.dtype,
                settings.muon_dtype,
                self.trainee,
                route_of(in_force(stage.config, at.repairs), self.model),
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

    def objective(self, stage: Stage, repairs: Sequence[Mapping[str, Any]]) -> Objective:
        """The stage's objective, under interventions and ``repairs``. UsageError if nobody supplied it."""
        name = stage.config.objective
        if name not in self.objectives:
            raise UsageError(
                f"stage '{stage.name}': objective '{name}' is none of {', '.join(sorted(self.objectives))}; "
                "whoever trains with it passes it to run_stages(objectives=...)"
            )
        objective = self.objectives[name]
        if stage.config.z_loss:
            objective = partial(objective, z_loss=stage.config.z_loss)  # type: ignore[call-arg]  # not all take it
        declared = in_force(stage.config, repairs)
        if declared and not isinstance(self.model, GPT):
            raise UsageError(f"stage '{stage.name}': interventions need a GPT; this is no stage of one")
        return intervened(objective, declared, self.run.path)

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

    def next_save(self, at: Position, index: int, step: int) -> int:
        """The next step after ``step`` at which a checkpoint is due."""
        config, due = self.stages[index].config, [self.stages[index].config.steps]
        if self.gate is not None and config.gate_every:
            due.append(at.next_gate(index, config.gate_every, step))
        if config.save_every:
            due.append(step - step % config.save_every + config.save_every)
        return min(due)

    def validate(self, stage: Stage, row: dict[str, Any]) -> None:
        if stage.validate is None:
            return
        route = self.updates.route if self.updates is not None else None
        self.model.eval()
        with (
            without_blocks(self.model, route.blocks if route is not None else ()),
            torch.no_grad(),
            autocast(self.settings.dtype, device_of(self.model)),
        ):
            found = stage.validate(self.model)
        self.model.train()
        for numbers in [found] if isinstance(found, dict) else found:
            self.records.log(row | numbers)

    # -- saving and judging --------------------------------------------------------------------------------

    def save(self, at: Position, index: int, step: int, update: int, why: str) -> None:
        """Save a checkpoint, then ledger it; decide here whether a gate is due at it."""
        stage = self.stages[index]
        name = saving.checkpoint_name(stage.name, step, at.attempt)
        ends = step == stage.config.steps
        last = ends and index == len(self.stages) - 1 and not self.settings.more
        every = stage.config.gate_every
        asked = every > 0 and (ends or (step > 0 and at.next_gate(index, every, step - 1) == step))
        due = self.gate is not None and step > 0 and (last or asked)
        place = {
            "stage": stage.name,
            "stage_index": index,
            "step": step,
            "attempt": at.attempt,
            "update": update,
        }
        plan = at.plan_for(index, stage.plan).model_dump(mode="json")
        state = {**place, "plan": plan, "seed": self.seed}
        if self.updates is not None:
            self.updates.check_finite(self.live)
            state |= self.settle_route(self.updates.route, ends)
        artifacts = saving.write_checkpoint(
            self.run,
            name,
            self.model,
            self.updates.optimizers if self.updates else None,
            self.tokenizer_file,
            state,
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
            **self.records.sync(),
            "artifacts": artifacts,
        }
        if self.incidents:
            body |= {"incidents": self.incidents[:MOST_INCIDENTS], "n_incidents": len(self.incidents)}
        self.ledger.append("checkpoint", body)
        self.live, self.incidents = name, []
        self.records.progress.note(f"saved {name}")
        crash_point("checkpoint.after-ledger")

    def settle_route(self, route: Route | None, ends: bool) -> dict[str, Any]:
        """What a checkpoint's state says of routed blocks: whoever judges or serves it is to do without. At
        the end of a stage they are removed for good.
        """
        if route is None:
            return {}
        if ends:
            remove_blocks(self.model, route.blocks)
        return {"routed": [block.model_dump(mode="json") for block in route.blocks]}

    # -- training on while a gate judges -------------------------------------------------------------------

    def train_ahead(self, at: Position) -> None:
        """Let the head be judged in another process, and train on as if nothing stood against it."""
        self.judge.begin(at)
        try:
            self.train(replace(at, phase="train", gates=at.gates + 1))
        except Interrupted:
            raise
        except GlasshouseError:
            if not self.judge.judging:
                raise
            settled = self.judge.settle()
            if settled is None or settled.dense != at.dense:
                self.throw_away()  # what failed would not have been trained
                return
            self.judge.stands()
            raise

    def standing(self, at: Position, index: int, first: int, step: int) -> Position | None:
        """Where the run stands once the gate has decided: ``step`` may be written down after that. None when
        the work since ``first`` was thrown away, because the decision leads elsewhere, or asks for a gate
        that was passed by.
        """
        if not self.judge.judging:
            return at
        settled = self.judge.settle()
        if settled is None or step > self.next_save(settled, index, first):
            self.throw_away()
            return None
        self.judge.stands()
        return settled

    def throw_away(self) -> None:
        """Do without what was trained since the head."""
        self.judge.thrown_away()
        self.live = REWOUND

    def stopped(self, at: Position) -> Stopped:
        if self.ledger.entries()[-1]["kind"] != "stop":
            self.ledger.append("stop", {"checkpoint": at.head, "reason": at.reason})
        return Stopped(
            f"the run stopped at {at.head} and waits for a person: {at.reason}. Read the report; then start "
            "a new run, or go on with an explicit override, which is recorded in the ledger"
        )

    # -- rows ----------------------------------------------------------------------------------------------

    def numbers(self, done: Done) -> dict[str, Any]:
        """A row's numbers of one update."""
        loss = done.loss
        numbers = {"loss": float(loss.total.detach()), **self.trainee.numbers(loss)}
        numbers |= {"lr": done.lr, "grad_norm": done.norm}
        if len(loss.parts) > 1:
            numbers |= {f"loss/{name}": float(value.detach()) for name, value in loss.parts.items()}
        return numbers
