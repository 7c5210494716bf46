"""What a stage of training is: its numbers (`StageConfig`) and its working parts (`Stage`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from glasshouse.base.config import Frozen
from glasshouse.base.plan import DataPlan
from glasshouse.train.interventions_config import Interventions


class StageConfig(Frozen):
    """The numbers of one stage. Shares are of the stage's steps, so that changing ``steps`` keeps the
    shape.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*(-[a-z0-9_]+)*$", description="also names its checkpoints")
    objective: Literal[
        "next_token",
        "sft",
        "unlikelihood",
        "reward_weighted",
        "dictionary",
        "reward",
        "dpo",
        "ppo",
        "grpo",
    ] = "next_token"
    steps: int = Field(ge=1, description="updates")
    batch_size: int = Field(ge=1, description="rows in a batch")
    accumulate: int = Field(1, ge=1, description="micro-batches that an update's rows go through in")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="what updates the hidden matrices")
    muon_lr: float = Field(0.02, ge=0, description="peak rate of the hidden matrices under Muon")
    adam_lr: float = Field(3e-3, ge=0, description="peak rate of everything that AdamW updates")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled, hidden matrices and head only; per step times rate"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm; None: not clipped")
    z_loss: float = Field(
        0.0, ge=0, description="times the mean squared log of the softmax's normaliser (PaLM: 1e-4)"
    )
    on_spike: Literal["log", "skip", "rewind", "stop"] = Field(
        "skip", description="what to do about a loss or gradient far outside the last 128 steps'"
    )
    max_skips: int = Field(16, ge=0, description="more skipped updates in 128 steps stop for a person")
    warmup_share: float = Field(0.02, ge=0, le=1)
    decay_share: float = Field(0.4, ge=0, le=1)
    final_lr_share: float = Field(0.0, ge=0, le=1, description="rate at the end, as a share of the peak")
    decay_shape: Literal["linear", "cosine"] = "linear"
    average_share: float = Field(
        0.0, ge=0, le=1, description="the stage ends with the mean of the weights over this share of its end"
    )
    gate_every: int = Field(
        0, ge=0, description="steps between gates, and one at the end; 0: final gate only"
    )
    save_every: int = Field(0, ge=0, description="steps between checkpoints without a gate; 0: none")
    val_every: int = Field(0, ge=0, description="steps between validations, and one at the end; 0: end only")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    monitor_every: int = Field(
        100, ge=0, description="steps between looks at activations, updates and gradient noise; 0: none"
    )

    intervention: Interventions = Field(
        (), description="what is done inside the model, or to gradients and data, while the stage trains"
    )
    uses: tuple[str, ...] = Field(
        (), description="constraints whose verifier the stage trains with: spent, and no longer evidence"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> StageConfig:
        if self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} add up to more than 1"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulate = {self.accumulate} equal "
                "micro-batches"
            )
        return self

    @property
    def spent(self) -> tuple[str, ...]:
        """Ids of the constraints that the stage or one of its interventions trains with, sorted."""
        return tuple(sorted({*self.uses, *(name for one in self.intervention for name in one.uses)}))


@dataclass(frozen=True)
class Stage:
    """A stage ready to run.

    ``batches(step, plan)`` is a pure function: the same step and plan give the same batch, for ever; a
    `Batch` for a GPT, what the `Trainee` understands for another module.
    ``validate(model)`` returns one row, or several, of numbers for metrics.jsonl ({"set", "loss", "bpb",
    ...}).
    """

    config: StageConfig
    batches: Callable[[int, DataPlan], Any]
    plan: DataPlan
    validate: Callable[[Any], dict[str, Any] | Sequence[dict[str, Any]]] | None = None

    @property
    def name(self) -> str:
        """The stage's name, as in the recipe."""
        return self.config.name
