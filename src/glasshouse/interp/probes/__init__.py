"""Probes that say what they mean: held-out, controlled, calibrated, and tested on what the model does."""

from glasshouse.interp.probes.alignment import Accuracy, Alignment, accuracy, align
from glasshouse.interp.probes.carriers import Carried, carriers
from glasshouse.interp.probes.causal import Causal, Decision, Effect, causal_effect, decision, patch_along
from glasshouse.interp.probes.composition import CompositionReport, composition_report
from glasshouse.interp.probes.controls import Control, Leakage, bag_of_words
from glasshouse.interp.probes.core import Probe, ProbeConfig, fit_probe, load_probe
from glasshouse.interp.probes.grid import Grid, Interchanges, combination, interchanges
from glasshouse.interp.probes.quality import Calibration, area, calibration
from glasshouse.interp.probes.report import ProbeReport, probe_report

__all__ = [
    "Accuracy",
    "Alignment",
    "Calibration",
    "Carried",
    "Causal",
    "CompositionReport",
    "Control",
    "Decision",
    "Effect",
    "Grid",
    "Interchanges",
    "Leakage",
    "Probe",
    "ProbeConfig",
    "ProbeReport",
    "accuracy",
    "align",
    "area",
    "bag_of_words",
    "calibration",
    "carriers",
    "causal_effect",
    "combination",
    "composition_report",
    "decision",
    "fit_probe",
    "interchanges",
    "load_probe",
    "patch_along",
    "probe_report",
]
