"""The report sets all constraints' evidence side by side and says which of it may be believed together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glasshouse.page.cut import Cuts, Limits
from glasshouse.page.read import RunRecord, read_run
from glasshouse.page.report import build_report
from glasshouse.page.statistics import Evidence, detector_text, evidence, number
from page.make_run import make_run


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("run") / "demo"
    make_run(folder, tmp_path_factory.mktemp("home"), "clean")
    return read_run(folder)


def shown(
    record: RunRecord, e_values: dict[str, Any], memory: dict[str, Any] | None = None
) -> Evidence | None:
    """The section of a run whose last gate has one verdict per e-value."""
    like = record.gates[-1].verdicts[0]
    verdicts = tuple(
        like | {"constraint": name, "status": "undecided", "e_fail": e, "memory": memory or {}}
        for name, e in e_values.items()
    )
    gates = (*record.gates[:-1], replace(record.gates[-1], verdicts=verdicts))
    return evidence(replace(record, gates=gates), Cuts(Limits()))


def test_what_is_large_enough_among_all_is_reported(record: RunRecord) -> None:
    """e-BH at 5%: of four e-values one must reach 80, two of them 40 each."""
    for e_values, many in (
        ({"a": 79.0, "b": 2.0, "c": 0.1, "d": 0.1}, 0),
        ({"a": 81.0, "b": 2.0, "c": 0.1, "d": 0.1}, 1),
        ({"a": 41.0, "b": 41.0, "c": 0.1, "d": 0.1}, 2),
    ):
        found = shown(record, e_values)
        assert found is not None and f"{many} of 4" in found.said
        assert str(found.rows).count("reported") == many


def test_the_declared_rate_counts(record: RunRecord) -> None:
    strict = replace(record, recipe=record.recipe | {"gate": {"false_discoveries": 0.01}})
    found = shown(strict, {"a": 81.0, "b": 2.0})
    assert found is not None and "0 of 2" in found.said and "1%" in found.said


def test_a_detector_says_how_near_an_alarm_it_is_and_which_it_raised(record: RunRecord) -> None:
    state = {"value": 0.25, "gates": 7, "alarms": [3, 9]}
    found = shown(record, {"a": 1.0}, {"detector": state})
    assert found is not None and "0.25 of an alarm, from 7 gates; alarm at gates 3, 9" in str(found.rows)
    assert (
        detector_text({"value": 1e-9, "gates": 1, "alarms": []}) == "less than 0.001 of an alarm, from 1 gate"
    )
    for odd in ({}, {"value": "x", "gates": None, "alarms": "3"}, {"value": -1, "gates": 2, "alarms": [{}]}):
        assert detector_text(odd) == ""


@pytest.mark.parametrize("e", [None, "many", -1.0, float("nan"), True, [1]])
def test_what_is_no_e_value_is_left_out(record: RunRecord, e: Any) -> None:
    found = shown(record, {"a": e, "b": 1.0})
    assert found is not None and "0 of 1" in found.said
    assert shown(record, {"a": e}) is None


def test_numbers_are_short() -> None:
    assert [number(x) for x in (None, 0.0, 0.0345678, 12.34567, 4.1e9, 3e-7)] == [
        *("", "0", "0.0346", "12.3", "10^9", "10^-7"),
    ]


def test_a_run_without_gates_has_no_such_section(record: RunRecord) -> None:
    assert evidence(replace(record, gates=()), Cuts(Limits())) is None


def test_the_section_stands_in_the_report(record: RunRecord, tmp_path: Path) -> None:
    assert b"Evidence, all constraints together" in build_report(record.path)
