"""Which part of a model does it: attribution by sums, by gradients, and by exact intervention."""

from glasshouse.interp.attribution.approximate import attribution_patching
from glasshouse.interp.attribution.direct import (
    DirectAttribution,
    attribution_by_position,
    attribution_of,
    direct_logit_attribution,
)
from glasshouse.interp.attribution.effects import Effects
from glasshouse.interp.attribution.gradients import activation_gradients
from glasshouse.interp.attribution.induction import InductionScores, induction_scores
from glasshouse.interp.attribution.integrated import (
    TokenAttribution,
    erasure,
    gradient_times_input,
    integrated_gradients,
)
from glasshouse.interp.attribution.knockout import Knockout, attention_knockout, each_head
from glasshouse.interp.attribution.lens import (
    LensReading,
    TunedLens,
    fit_tuned_lens,
    logit_lens,
    tuned_lens_loss,
)
from glasshouse.interp.attribution.patch import ablate, patch_activations
from glasshouse.interp.attribution.paths import path_patching
from glasshouse.interp.attribution.patterns import AttentionPatterns, attention_pattern_view
from glasshouse.interp.attribution.places import Place, attention_inputs, components, stream
from glasshouse.interp.reading.gradients import frozen

__all__ = [
    "AttentionPatterns",
    "DirectAttribution",
    "Effects",
    "InductionScores",
    "Knockout",
    "LensReading",
    "Place",
    "TokenAttribution",
    "TunedLens",
    "ablate",
    "activation_gradients",
    "attention_inputs",
    "attention_knockout",
    "attention_pattern_view",
    "attribution_by_position",
    "attribution_of",
    "attribution_patching",
    "components",
    "direct_logit_attribution",
    "each_head",
    "erasure",
    "fit_tuned_lens",
    "frozen",
    "gradient_times_input",
    "induction_scores",
    "integrated_gradients",
    "logit_lens",
    "patch_activations",
    "path_patching",
    "stream",
    "tuned_lens_loss",
]
