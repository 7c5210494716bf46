"""Check declared constraints on a checkpoint, decide, act, and keep the evidence."""

from glasshouse.verify.gate import ConstraintGate, GateConfig
from glasshouse.verify.schema import Constraint, load_constraints, read_constraints
from glasshouse.verify.sequential import SequentialTest

__all__ = [
    "Constraint",
    "ConstraintGate",
    "GateConfig",
    "SequentialTest",
    "load_constraints",
    "read_constraints",
]
