"""One update: batch, gradient, guard, optimiser; and a look inside now and then.

The guard stands between gradient and optimiser: what is not finite never reaches a parameter or an
optimiser's state, and what is far out of the ordinary only if the stage's ``on_spike`` says so.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from glasshouse.base.errors import TrainingError
from glasshouse.base.plan import DataPlan
from glasshouse.train import memory
from glasshouse.train.config import Stage
from glasshouse.train.interventions_config import Route
from glasshouse.train.objective import Loss, Objective
from glasshouse.train.optim import Muon, Optimizers
from glasshouse.train.routing import apart_in, routed_backward
from glasshouse.train.schedule import warmup_stable_decay
from glasshouse.train.stability import NOT_FINITE_IN_A_ROW, WINDOW, Detector, Spike, broken
from glasshouse.train.step import backward, device_of
from glasshouse.train.trainee import LANGUAGE, Trainee

Action = Literal["apply", "skip", "rewind", "stop"]


@dataclass(frozen=True)
class Done:
    """What became of a step. ``norm`` is that of the gradient before clipping; ``seen`` a monitor's row."""

    loss: Loss
    norm: float
    lr: float
    shards: tuple[str, ...]
    spike: Spike | None = None
    action: Action = "apply"
    reason: str = ""
    seen: dict[str, Any] | None = None


class Updater:
    """The updates of one stage. Optimisers and detector are its state; both are part of a checkpoint."""

    model: Any

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        objective: Objective,
        dtype: str,
        muon_dtype: str,
        trainee: Trainee = LANGUAGE,
        route: Route | None = None,
    ):
        self.model = model
        self.stage, self.objective, self.dtype = stage, objective, dtype
        self.trainee, self.route = trainee, route
        self.optimizers = Optimizers(model, stage.config, muon_dtype, trainee.groups(model, stage.config))
        if route is not None:
            for inner in self.optimizers.inner:
                if isinstance(inner, Muon):
                    inner.apart = apart_in(self.model, route.blocks)
        self.detector = Detector(self.optimizers.names)
        self.asked = False  # whether there is room
        self.room: int | None = None  # bytes for activations

    def __call__(self, step: int, plan: DataPlan, good: str | None) -> Done:
        """Do update ``step`` (from 0) unless the guard is against it; ``good`` names the last checkpoint.

        Raises DataError for a batch that does not fit the model; TrainingError when memory runs out (naming
        the setting that fits), when several losses in a row are not finite, or a parameter is not.
        """
        phase = plan.at(step)
        if phase.from_step == step:
            self.detector.forget()
        batch = self.stage.batches(step, plan)
        rows = self.trainee.batch(batch, self.model, self._at(step))
        try:
            self._fit(rows)
            return self._update(step, rows, good)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()
        # Outside of the handler: an error's traceback keeps the tensors of the failed step alive.
        raise TrainingError(
            f"{self._at(step)}: memory ran out ({said[0] if said else 'no details'}); {self._advice(rows)}"
        )

    def _at(self, step: int) -> str:
        return f"stage '{self.stage.name}', step {step}"

    def _update(self, step: int, batch: Any, good: str | None) -> Done:
        config, optimizers = self.stage.config, self.optimizers
        optimizers.zero_grad()
        loss = self._backward(batch)
        value = float(loss.total.detach())
        if math.isfinite(value):
            self.trainee.after_backward(self.model)
        norms = optimizers.norms() if math.isfinite(value) else []
        norm = math.hypot(*norms) if norms else math.nan
        spike = self.detector.look(value, norms)
        action, reason = self._judge(spike, step, batch, good)
        factor = warmup_stable_decay(
            step,
            config.steps,
            warmup_share=config.warmup_share,
            decay_share=config.decay_share,
            final_share=config.final_lr_share,
            shape=config.decay_shape,
        )
        seen: dict[str, Any] | None = None
        if action == "apply":
            monitor = self.trainee.look(self.model) if self._due(step) else None
            if monitor is not None:
                monitor.before(self.objective, batch, self.dtype, norm, config.accumulate)
            optimizers.clip(norm)
            optimizers.step(factor)
            self.trainee.after_update(self.model, optimizers, batch, loss, step)
            seen = monitor.after() if monitor is not None else None
        lr = optimizers.groups[0].lr * factor
        return Done(loss, norm, lr, batch.shards, spike, action, reason, seen)

    def _backward(self, batch: Any) -> Loss:
        model, pieces = self.model, self.stage.config.accumulate
        if self.route is None:
            return backward(model, self.objective, batch, self.dtype, pieces)
        return routed_backward(model, self.objective, batch, self.dtype, pieces, self.route)

    def _due(self, step: int) -> bool:
        every = self.stage.config.monitor_every
        return every > 0 and (step + 1) % every == 0

    def _judge(self, spike: Spike | None, step: int, batch: Any, good: str | None) -> tuple[Action, str]:
        """What to do about ``spike``, and why in words."""
        config, detector = self.stage.config, self.detector
        if spike is None or (spike.finite and config.on_spike == "log"):
            detector.applied()
            return "apply", ""
        shards = ", ".join(batch.shards)
        reason = f"{self._at(step)}: the {spike} on a batch from {shards}"
        if config.on_spike == "rewind" or config.on_spike == "stop":
            return config.on_spike, reason
        detector.skip(spike)
        culprit = None if spike.finite else broken(self.model, {})
        if culprit is not None or detector.in_a_row >= NOT_FINITE_IN_A_ROW:
            what = (
                f"{culprit} is not finite"
                if culprit
                else f"{detector.in_a_row} updates in a row were not finite and not applied"
            )
            raise TrainingError(
                f"{reason}. {what[0].upper()}{what[1:]}; the last good checkpoint is {good}. Look at "
                "those shards, or start a new run with lower muon_lr, adam_lr or clip_norm in stage "
                f"'{config.name}'"
            )
        if detector.too_many(config.max_skips):
            n = config.max_skips
            return "stop", f"{reason}; more than {n} of the last {WINDOW} updates were skipped"
        return "skip", reason

    # -- memory --------------------------------------------------------------------------------------------

    def _fit(self, batch: Any) -> None:
        """Before the first step, note how much room there is: a process keeps what it freed, so afterwards
        the system's word says little. Refuse what cannot fit at all: Linux does not refuse memory, it kills.
        """
        if self.asked:
            return
        self.asked = True
        available = memory.available_bytes(device_of(self.model))
        if available is None:
            return
        if not self.optimizers.state_tensors():  # gradients and two moments are still to come
            available -= 3 * sum(p.nbytes for p in self.model.parameters())
        self.room = max(0, available)
        need = self.trainee.need(self.model, self.objective, batch, self.dtype)
        if need is None:
            return
        rows = self.stage.config.batch_size // self.stage.config.accumulate
        if memory.HOPELESS * need.of(rows) > self.room:
            raise MemoryError("not tried: it could not fit")

    def _advice(self, batch: Any) -> str:
        config = self.stage.config
        self.optimizers.zero_grad()
        gc.collect()
        try:
            need = self.trainee.need(self.model, self.objective, batch, self.dtype)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            return "not even one row fits; set a smaller model.context or model, or take more memory"
        if need is None:
            return f"set a smaller batch_size than {config.batch_size}, or a smaller model"
        return memory.advice(need, config.name, config.batch_size, config.accumulate, self.room)

    def check_finite(self, good: str | None) -> None:
        """Raise TrainingError if a parameter or an entry of the optimisers' state is not finite: such a
        checkpoint must not be saved.
        """
        culprit = broken(self.model, self.optimizers.state_tensors())
        if culprit is not None:
            raise TrainingError(
                f"stage '{self.stage.name}': {culprit} is not finite; nothing was saved, and the last good "
                f"checkpoint is {good}. Start a new run with lower muon_lr, adam_lr or clip_norm"
            )
