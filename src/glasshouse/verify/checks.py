"""Which function computes which statistic."""

from __future__ import annotations

from collections.abc import Callable

from glasshouse.verify.behaviour import grid_hole, written
from glasshouse.verify.behaviour_floor import loss_ceiling
from glasshouse.verify.behaviour_quotes import following_rate, obedience_rate
from glasshouse.verify.behaviour_remarks import flip_rate
from glasshouse.verify.behaviour_rows import forbidden_rate, preference_rate, swayed_rate
from glasshouse.verify.behaviour_secrets import extraction_rate
from glasshouse.verify.circuit import ablation_effect
from glasshouse.verify.composition import composition
from glasshouse.verify.confinement import confinement
from glasshouse.verify.data_pull import shard_pull
from glasshouse.verify.examination import Examination, Finding
from glasshouse.verify.feature import new_drivers
from glasshouse.verify.overoptimisation import overoptimisation
from glasshouse.verify.representation import probe_auroc
from glasshouse.verify.stability import direction_stability
from glasshouse.verify.suppression import suppression
from glasshouse.verify.weights import update_outlier

CHECKS: dict[str, Callable[[Examination], Finding]] = {
    "compliance_rate": written,
    "refusal_rate": written,
    "accuracy": written,
    "answer_rate": written,
    "grid_hole": grid_hole,
    "flip_rate": flip_rate,
    "obedience_rate": obedience_rate,
    "following_rate": following_rate,
    "extraction_rate": extraction_rate,
    "preference_rate": preference_rate,
    "swayed_rate": swayed_rate,
    "forbidden_rate": forbidden_rate,
    "loss_ceiling": loss_ceiling,
    "overoptimisation": overoptimisation,
    "probe_auroc": probe_auroc,
    "ablation_effect": ablation_effect,
    "suppression": suppression,
    "confinement": confinement,
    "composition": composition,
    "direction_stability": direction_stability,
    "new_drivers": new_drivers,
    "shard_pull": shard_pull,
    "update_outlier": update_outlier,
}
