"""Circuits: which edges of a model carry a behaviour, found by machine and measured."""

from glasshouse.interp.circuits.ablation import Ablation
from glasshouse.interp.circuits.circuit import About, Circuit, CircuitDiff
from glasshouse.interp.circuits.curve import FRACTIONS, Curve, mib_curve
from glasshouse.interp.circuits.features import FeatureGraph, feature_graph
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.circuits.intervene import Interventions, check_interventions
from glasshouse.interp.circuits.measure import (
    Completeness,
    Faithfulness,
    Minimality,
    completeness,
    divergence,
    faithfulness,
    minimality,
    random_circuits,
    recheck,
    recovered,
)
from glasshouse.interp.circuits.patcher import Patcher
from glasshouse.interp.circuits.planted import Planted, Shape, planted_transformer
from glasshouse.interp.circuits.scores import METHODS, EdgeScores, pooled, score_edges

__all__ = [
    "FRACTIONS",
    "METHODS",
    "Ablation",
    "About",
    "Circuit",
    "CircuitDiff",
    "Completeness",
    "Curve",
    "EdgeScores",
    "Faithfulness",
    "FeatureGraph",
    "Graph",
    "Interventions",
    "Minimality",
    "Patcher",
    "Planted",
    "Shape",
    "check_interventions",
    "completeness",
    "divergence",
    "faithfulness",
    "feature_graph",
    "mib_curve",
    "minimality",
    "planted_transformer",
    "pooled",
    "random_circuits",
    "recheck",
    "recovered",
    "score_edges",
]
