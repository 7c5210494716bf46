"""Which function computes which statistic."""

from __future__ import annotations

from collections.abc import Callable

from glasshouse.verify.behaviour import grid_hole, written
from glasshouse.verify.circuit import ablation_effect
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.representation import probe_auroc
from glasshouse.verify.suppression import suppression

CHECKS: dict[str, Callable[[Examination], Finding]] = {
    "compliance_rate": written,
    "refusal_rate": written,
    "accuracy": written,
    "grid_hole": grid_hole,
    "probe_auroc": probe_auroc,
    "ablation_effect": ablation_effect,
    "suppression": suppression,
}
