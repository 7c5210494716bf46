"""Floor 2: one loop for any objective: optimisation, checkpoints, gates, rollbacks, resuming."""

from glasshouse.train.checkpoint import load_weights
from glasshouse.train.config import Stage, StageConfig
from glasshouse.train.fold import Position, position
from glasshouse.train.gate import Checkpoint, Decision, Gate, GateRecord
from glasshouse.train.identity import check_environment, enter_run, environment
from glasshouse.train.loop import run_stages
from glasshouse.train.objective import Loss, evaluate, next_token, sft
from glasshouse.train.precision import choose_compile, choose_device, choose_dtype, choose_threads, muon_dtype
from glasshouse.train.progress import Progress, make_progress
from glasshouse.train.settings import Outcome, Settings
from glasshouse.train.trainee import Trainee

__all__ = [
    "Checkpoint",
    "Decision",
    "Gate",
    "GateRecord",
    "Loss",
    "Outcome",
    "Position",
    "Progress",
    "Settings",
    "Stage",
    "StageConfig",
    "Trainee",
    "check_environment",
    "choose_compile",
    "choose_device",
    "choose_dtype",
    "choose_threads",
    "enter_run",
    "environment",
    "evaluate",
    "load_weights",
    "make_progress",
    "muon_dtype",
    "next_token",
    "position",
    "run_stages",
    "sft",
]
