"""The ecosystem's files: SAELens, sparsify, dictionary_learning, circuit-tracer, Neuronpedia, MIB."""

from glasshouse.interp.formats.dictlearn import read_dictionary_learning
from glasshouse.interp.formats.fit import check_fits
from glasshouse.interp.formats.graph import AttributionGraph, GraphLink, GraphNode
from glasshouse.interp.formats.mib import CircuitFile, ScoredEdge, Shape, read_circuit, write_circuit
from glasshouse.interp.formats.neuronpedia import Explanation, Source, read_batch, write_pages, write_source
from glasshouse.interp.formats.pages import Page, PageOptions, feature_pages
from glasshouse.interp.formats.saelens import read_saelens, read_sparsity, write_saelens
from glasshouse.interp.formats.sparsify import read_sparsify, write_sparsify
from glasshouse.interp.formats.viewer import read_graph, write_graph

__all__ = [
    "AttributionGraph",
    "CircuitFile",
    "Explanation",
    "GraphLink",
    "GraphNode",
    "Page",
    "PageOptions",
    "ScoredEdge",
    "Shape",
    "Source",
    "check_fits",
    "feature_pages",
    "read_batch",
    "read_circuit",
    "read_dictionary_learning",
    "read_graph",
    "read_saelens",
    "read_sparsify",
    "read_sparsity",
    "write_circuit",
    "write_graph",
    "write_pages",
    "write_saelens",
    "write_source",
    "write_sparsify",
]
