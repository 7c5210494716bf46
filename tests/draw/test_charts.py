"""Charts are well-formed, deterministic, described, and hold nothing but numbers in their coordinates."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.draw import (
    STATUSES,
    STYLE,
    Axes,
    Bar,
    Lane,
    Mark,
    Series,
    bars,
    heat_map,
    interval_strip,
    label,
    line_chart,
    status_mark,
)
from glasshouse.draw.lines import thin
from glasshouse.draw.scale import Scale, domain, log_ticks, ticks

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
NAUGHTY = "<script>alert(1)</script>\x00\u202e"


def parse(svg: str) -> ElementTree.Element:
    """The picture as XML; also checks that no coordinate is a nan."""
    assert not re.search(
        r'(?:nan|inf)(?=[ "MLHV])', re.sub(r"<(title|desc|text)[^>]*>[^<]*|aria-label=\"[^\"]*\"", "", svg)
    )
    return ElementTree.fromstring(svg)


def described(svg: str) -> bool:
    """The picture names and describes itself."""
    root = parse(svg)
    return (
        root.get("role") == "img"
        and bool(root.get("aria-label"))
        and root[0].tag == "title"
        and root[1].tag == "desc"
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ANY_FLOAT, ANY_FLOAT), max_size=30), st.booleans(), st.sampled_from([343, 920]))
def test_a_line_chart_of_any_floats_is_well_formed(
    points: list[tuple[float, float]], log: bool, width: int
) -> None:
    series = [Series(NAUGHTY, points, style="both", intervals=[(x, y, y) for x, y in points])]
    lanes = [Lane(NAUGHTY, [Mark(x, "fail", NAUGHTY) for x, _ in points])]
    assert described(str(line_chart(series, "t", "d", Axes(y_label="y", log=log, lanes=lanes), width=width)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(ANY_FLOAT, max_size=6), max_size=6))
def test_a_heat_map_of_any_floats_is_well_formed(values: list[list[float]]) -> None:
    columns = [f"t{j}" for j in range(max((len(r) for r in values), default=0))]
    assert described(str(heat_map(values, [str(i) for i in range(len(values))], columns, "t", "d")))


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_FLOAT, max_size=8))
def test_bars_of_any_floats_are_well_formed(values: list[float]) -> None:
    assert described(str(bars([Bar(NAUGHTY, v, True, NAUGHTY) for v in values], "t", "d")))


def test_the_same_data_gives_the_same_bytes() -> None:
    def draw() -> str:
        axes = Axes(lanes=[Lane("refusal", [Mark(1, "pass"), Mark(2, "fail")])], bounds=[(0.5, "bound")])
        return str(line_chart([Series("a", [(0, 1.0), (1, 0.5), (2, 0.25)])], "t", "d", axes))

    assert draw() == draw()


def test_a_curve_breaks_where_a_loss_is_not_finite() -> None:
    svg = str(
        line_chart([Series("", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0)])], "t", "d", Axes())
    )
    (path,) = re.findall(r'<path d="([^"]*)" class="line c0"', svg)
    assert path.count("M") == 2 and path.count("L") == 2


def test_every_status_has_its_own_shape_and_an_unknown_one_looks_like_an_error() -> None:
    shapes = {re.sub(r'class="mark [^"]*"', "", str(status_mark(9, 9, s, ""))) for s in STATUSES}
    assert len(shapes) == len(STATUSES)
    assert status_mark(9, 9, "brilliant", "") == status_mark(9, 9, "error", "")


def test_layer_zero_stands_at_the_bottom_of_a_heat_map() -> None:
    root = parse(str(heat_map([[0.1], [0.9]], ["0", "1"], ["tok"], "t", "d")))
    at = {t.text: float(t.get("y", 0)) for t in root.iter("text")}
    assert at["0"] > at["1"]


def test_heat_map_cells_tell_their_values_in_a_tooltip() -> None:
    assert "<title>layer 3, mar: 0.25</title>" in str(heat_map([[0.25]], ["layer 3"], ["mar"], "t", "d"))


def test_the_interval_plot_places_estimate_bound_and_interval_on_one_axis() -> None:
    root = parse(str(interval_strip(0.5, (0.25, 0.75), (-1e18, 0.1), "fail", "t", width=112)))
    paths = [p.get("d") for p in root.iter("path")]
    assert "M16 3V27" in paths  # the bound: 6 + 0.1 * 100
    assert "M31 15H81" in paths  # the interval


def test_charts_name_classes_that_the_style_sheet_knows_and_no_colours() -> None:
    lanes = [Lane("x", [Mark(i, s) for i, s in enumerate(STATUSES)])]
    svg = str(line_chart([Series("a", [(0, 1.0), (4, 2.0)])], "t", "d", Axes(lanes=lanes)))
    assert not re.search(r"#[0-9a-f]{3}|rgb|(fill|stroke)=", svg)
    for name in re.findall(r'class="mark (s-\w+)"', svg):
        assert f".{name}" in STYLE


@given(ANY_FLOAT, ANY_FLOAT)
def test_ticks_lie_within_the_axis_and_are_few(a: float, b: float) -> None:
    lo, hi = domain([a, b])
    found = ticks(lo, hi)
    slack = (hi - lo) * 1e-6
    assert 1 <= len(found) <= 52 and all(lo - slack <= t <= hi + slack for t in found)


@given(st.floats(min_value=1e-12, max_value=1e12), st.floats(min_value=1e-12, max_value=1e12))
def test_logarithmic_ticks_lie_within_the_axis_and_are_few(a: float, b: float) -> None:
    lo, hi = domain([a, b], log=True)
    assert 1 < len(log_ticks(lo, hi)) <= 8
    assert all(lo <= t <= hi for t in log_ticks(lo, hi))


def test_a_scale_maps_ends_to_ends_and_holds_what_lies_outside() -> None:
    scale = Scale(0, 10, 100, 200)
    assert [scale(v) for v in (0, 5, 10, 99, -99)] == [100, 150, 200, 200, 100]
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)


def test_thinning_keeps_the_mean_and_the_size_down() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert {y for _, y in few} == {0.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (1234, "1,234"),
        (38_000, "38k"),
        (1_592_448, "1.59M"),
        (0.00001, "1e-05"),
        (0, "0"),
        (-0.25, "-0.25"),
    ],
)
def test_numbers_read_as_people_write_them(value: float, text: str) -> None:
    assert label(value) == text
