"""`GateCallback`: gates in a `transformers.Trainer`, and so in TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.base.errors import Stopped, UsageError
from glasshouse.recipes.watch import Watch

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # the name must exist; making one says what is missing
        TrainerCallback = object


class GateCallback(TrainerCallback):
    """Judges the model every ``every`` steps and at the end: ``trainer.add_callback(gh.GateCallback(...))``.

    Arguments are `Watch`'s; ``tokenizer`` may be left out where the trainer has one (its
    ``processing_class``, which must be a fast tokenizer). A constraint that asks to stop or to go back ends
    the training, and ``callback.stopped`` says why.
    """

    def __init__(
        self, constraints: str | Path, *, run: str | Path, tokenizer: str | Path | None = None, **how: Any
    ):
        if TrainerCallback is object:
            raise UsageError("GateCallback needs transformers: pip install 'glasshouse-lm[hf]'")
        self.make: Callable[[str | Path], Watch] = lambda folder: Watch(
            run, constraints, tokenizer=folder, **how
        )
        self.tokenizer, self.run = tokenizer, Path(run)
        self.watch: Watch | None = None
        self.stopped: str | None = None
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the run folder, before anything is trained."""
        if not state.is_world_process_zero:
            return
        folder = self.tokenizer
        if folder is None:
            processing = kwargs.get("processing_class")
            if processing is None or not getattr(processing, "is_fast", False):
                raise UsageError("GateCallback: the trainer has no fast tokenizer; give tokenizer=folder")
            folder = self.run.with_name(self.run.name + ".tokenizer")
            processing.save_pretrained(str(folder))
        self.watch = self.make(folder)
        self.watch.start(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss that the trainer reports; it goes into the metrics with the next step."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge when a gate is due; end the training when a constraint asks for it."""
        if self.watch is None or self.stopped is not None:
            return
        numbers = {} if self.loss is None else {"loss": self.loss}
        self.loss = None
        try:
            self.watch(kwargs["model"], state.global_step, **numbers)
        except Stopped as why:
            self.stopped = str(why)
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Promote or hold the last model; a run that was stopped stays held."""
        if self.watch is not None and self.stopped is None:
            try:
                self.watch.finish(kwargs["model"], state.global_step)
            except Stopped as why:
                self.stopped = str(why)
