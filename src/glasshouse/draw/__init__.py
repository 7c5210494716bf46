"""Plain data in, deterministic SVG and escaped HTML out: charts, heat maps, rankings, tables."""

from glasshouse.draw.grids import Bar, bars, heat_map
from glasshouse.draw.lines import Axes, Lane, Mark, Series, interval_strip, line_chart
from glasshouse.draw.scale import label
from glasshouse.draw.svg import STATUSES, STYLE, status_class, status_mark, styled
from glasshouse.draw.table import table
from glasshouse.draw.text import clean, esc, mark_word

__all__ = [
    "STATUSES",
    "STYLE",
    "Axes",
    "Bar",
    "Lane",
    "Mark",
    "Series",
    "bars",
    "clean",
    "esc",
    "heat_map",
    "interval_strip",
    "label",
    "line_chart",
    "mark_word",
    "status_class",
    "status_mark",
    "styled",
    "table",
]
