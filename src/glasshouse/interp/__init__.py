"""Explain activations: probes, directions, patching, and the documents behind a read-out."""

from glasshouse.interp.direction import difference_of_means, project_out, random_directions, steer
from glasshouse.interp.influence import document_scores, readout_gradient
from glasshouse.interp.patching import Patching, patch_residuals
from glasshouse.interp.probe import LinearProbe, auroc, control_labels, fit_logistic

__all__ = [
    "LinearProbe",
    "Patching",
    "auroc",
    "control_labels",
    "difference_of_means",
    "document_scores",
    "fit_logistic",
    "patch_residuals",
    "project_out",
    "random_directions",
    "readout_gradient",
    "steer",
]
