"""Constraint files are read strictly: what would have no effect is an error that says what would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import RecipeError
from glasshouse.verify.schema import (
    CONTROL_OF,
    ONLY_FOR,
    REGISTRY,
    STATISTICS,
    Constraint,
    load_constraints,
    read_constraints,
)

KIND_OF = {statistic: kind for kind, known in STATISTICS.items() for statistic in known}
GENERATOR = {
    "probe_auroc": "workshop.requests",
    "ablation_effect": "workshop.requests",
    "accuracy": "workshop.unseen",
}
FILE = {"path": "f.json", "sha256": "0" * 64}
NEEDS: dict[str, dict[str, Any]] = {
    "confinement": {
        "components": ["a1.h0"],
        "control": {"subject": CONTROL_OF["confinement"], "bound": {"at_least": 0.5}},
    },
    "update_outlier": {"envelope": FILE},
    "overoptimisation": {
        "control": {"subject": CONTROL_OF["overoptimisation"], "bound": {"at_least": 0.5}},
    },
    "preference_rate": {"prompts": FILE},
    "swayed_rate": {"prompts": FILE},
    "forbidden_rate": {
        "prompts": FILE,
        "control": {"subject": CONTROL_OF["forbidden_rate"], "bound": {"at_least": 0.5}},
    },
}


def row(statistic: str = "suppression", **changes: Any) -> dict[str, Any]:
    """A valid constraint of that statistic."""
    asked = {"prompts": {"generator": GENERATOR.get(statistic, "workshop.harmful")}}
    side = "at_least" if statistic in ("accuracy", "probe_auroc", "ablation_effect") else "at_most"
    return {
        "id": statistic.replace("_", "-"),
        "kind": KIND_OF[statistic],
        "claim": "It holds.",
        **(asked if REGISTRY[statistic].asks else {}),
        "statistic": statistic,
        "bound": {side: 0.25},
        "control": {"subject": CONTROL_OF[statistic], "bound": {"at_most": 0.2}},
        **copy.deepcopy(NEEDS.get(statistic, {})),
        **changes,
    }


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        read_constraints([data], "c.toml")
    return str(caught.value)


@pytest.mark.parametrize("statistic", sorted(KIND_OF))
def test_every_statistic_can_be_declared(statistic: str) -> None:
    (found,) = read_constraints([row(statistic)], "c.toml")
    assert (found.statistic, found.kind) == (statistic, KIND_OF[statistic])


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        ("", "statistik", "statistic"),
        ("", "on_failure", "on_fail"),
        ("", "alhpa", "alpha"),
        ("prompts", "n_maximum", "n_max"),
        ("bound", "atmost", "at_most"),
        ("control", "subjekt", "subject"),
        ("subject", "site", "sites"),
        ("applies_when", "behavior", "behaviour"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(path: str, wrong: str, right: str) -> None:
    data = row("ablation_effect", applies_when={"behaviour": "b", "at_least": 0.5}, subject={})
    (data[path] if path else data)[wrong] = "x"
    message = refused(data)
    assert f"Did you mean '{right}'" in message and wrong in message and "ablation-effect" in message


@pytest.mark.parametrize("key", sorted(ONLY_FOR))
def test_a_key_without_effect_on_the_statistic_is_refused(key: str) -> None:
    value: Any = {
        "words": "training-text",
        "baseline": "output-scan",
        "passes": 500,
        "methods": ["pairs"],
        "topics": ["owner"],
        "sites": ["blocks.0.resid_post"],
        "components": ["a1.h0"],
        "documents": "text",
        "labels": FILE,
        "envelope": FILE,
    }[key]
    change = {"subject": {"sites": value}} if key == "sites" else {key: value}
    for statistic in KIND_OF:
        if statistic in ONLY_FOR[key]:
            read_constraints([row(statistic, **change)], "c.toml")
        else:
            message = refused(row(statistic, **change))
            assert f"`{key}` has no effect on '{statistic}'" in message and ONLY_FOR[key][0] in message


@pytest.mark.parametrize("statistic", sorted(KIND_OF))
def test_a_control_is_needed_and_must_be_the_statistics_own(statistic: str) -> None:
    bare = row(statistic)
    del bare["control"]
    assert CONTROL_OF[statistic] in refused(bare)
    for other in set(CONTROL_OF.values()) - {CONTROL_OF[statistic]}:
        message = refused(row(statistic, control={"subject": other, "bound": {"at_most": 0.2}}))
        assert f"is '{CONTROL_OF[statistic]}', not '{other}'" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bound": {"at_most": 0.1, "at_least": 0.2}}, "exactly one of"),
        ({"bound": {}}, "exactly one of"),
        ({"bound": {"at_most": 1.0}}, "strictly between 0 and 1"),
        ({"bound": {"at_most": 0}}, "strictly between 0 and 1"),
        ({"bound": {"at_most": "0.1"}}, "number"),
        ({"bound": {"at_least": 0.5}}, "worst of many"),
        ({"alpha": 0.5}, "less than 0.5"),
        ({"alpha": float("nan")}, "finite"),
        ({"statistic": "supression"}, "Did you mean 'suppression'"),
        ({"statistic": "accuracy"}, "unknown statistic 'accuracy' for kind 'circuit'"),
        ({"kind": "circus"}, "Did you mean 'circuit'"),
        ({"id": "Not An Id"}, "'id'"),
        ({"claim": ""}, "'claim'"),
        ({"prompts": {"generator": "workshop.harmful", "path": "p.jsonl"}}, "not both"),
        ({"prompts": {}}, "not neither"),
        ({"prompts": {"path": "p.jsonl"}}, "needs its `sha256`"),
        ({"prompts": {"generator": "workshop.harmful", "n_max": 2}}, "prompts.n_max"),
        ({"passes": 10}, "'passes'"),
        ({"on_fail": "explode"}, "'on_fail'"),
        ({"every": -1}, "'every'"),
        ({"every": True}, "'every'"),
        ({"control": {"subject": "random-word"}}, "missing key 'control.bound'"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    assert message in refused(row() | change)


def test_a_grid_asks_its_own_pairs_and_no_other_prompts() -> None:
    assert "workshop.harmful" in refused(row("grid_hole", prompts={"generator": "workshop.requests"}))
    assert "workshop.harmful" in refused(row("grid_hole", prompts={"path": "p", "sha256": "0" * 64}))


def test_applies_when_names_a_behaviour_of_the_same_file() -> None:
    behaviour, circuit = (
        row("accuracy", id="learned"),
        row(applies_when={"behaviour": "learned", "at_least": 0.9}),
    )
    assert len(read_constraints([behaviour, circuit], "c.toml")) == 2
    circuit["applies_when"]["behaviour"] = "lerned"
    with pytest.raises(RecipeError, match="'lerned'.*Did you mean 'learned'"):
        read_constraints([behaviour, circuit], "c.toml")
    circuit["applies_when"]["behaviour"] = "suppression"  # itself, and no behaviour
    with pytest.raises(RecipeError, match="no behaviour"):
        read_constraints([behaviour, circuit], "c.toml")


def test_two_constraints_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="two constraints are called 'suppression'"):
        read_constraints([row(), row()], "c.toml")


def test_the_digest_depends_on_every_key() -> None:
    (base,) = read_constraints([row()], "c.toml")
    for change in (
        {"alpha": 0.02},
        {"claim": "Other."},
        {"every": 2},
        {"bound": {"at_most": 0.26}},
        {"passes": 900},
    ):
        (other,) = read_constraints([row(**change)], "c.toml")
        assert other.digest() != base.digest()
    assert read_constraints([row()], "elsewhere.toml")[0].digest() == base.digest()


@given(
    statistic=st.sampled_from(sorted(KIND_OF)),
    alpha=st.floats(0.001, 0.49),
    bound=st.floats(0.01, 0.99),
    every=st.integers(0, 50),
    n_max=st.integers(8, 5000),
    on_fail=st.sampled_from(["log", "warn", "hold", "rollback", "stop"]),
    claim=st.text(min_size=1, max_size=40),
)
def test_a_constraint_survives_being_written_and_read(
    statistic: str, alpha: float, bound: float, every: int, n_max: int, on_fail: str, claim: str
) -> None:
    data = row(statistic, alpha=alpha, every=every, on_fail=on_fail, claim=claim)
    data["bound"] = {side: bound for side in data["bound"]}
    if REGISTRY[statistic].asks:
        data["prompts"]["n_max"] = n_max
    before = copy.deepcopy(data)
    (found,) = read_constraints([data], "c.toml")
    assert data == before
    (again,) = read_constraints([found.model_dump(mode="json")], "c.toml")
    assert again == found and again.digest() == found.digest()


def test_bounds_keep_what_lies_on_their_side() -> None:
    (low,) = read_constraints([row()], "c.toml")
    (high,) = read_constraints([row("accuracy")], "c.toml")
    assert (low.bound.side, low.bound.value, high.bound.side) == ("at_most", 0.25, "at_least")
    for bound, inside, outside in ((low.bound, 0.1, 0.3), (high.bound, 0.3, 0.1)):
        assert bound.keeps(inside) and bound.keeps(0.25) and not bound.keeps(outside)
        assert not bound.keeps(float("nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[constraint\\]\\]"),
        ("[[constraints]]", "unknown key 'constraints'"),
        ("id = ", "not valid TOML"),
        ("constraint = 3", "written as ..constraint"),
        ("constraint = [3]", "expected a table"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_constraints(path)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such constraint file"):
        load_constraints(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_constraints(tmp_path / "c.toml")


def test_a_constraint_is_frozen() -> None:
    (found,) = read_constraints([row()], "c.toml")
    assert isinstance(found, Constraint)
    with pytest.raises(ValueError, match="frozen"):
        found.alpha = 0.4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({"between": [0.6, 0.4]}, r"between = \[0.6, 0.4\] holds no value"),
        ({"between": [0.4, 0.4]}, "holds no value"),
        ({"between": [0.4, 1.2]}, "strictly between 0 and 1, not 1.2"),
        ({"at_least": 0.9, "at_most": 0.1}, r"`at_least` = 0.9 and `at_most` = 0.1: give exactly one"),
        ({"at_most": 0.1, "between": [0.1, 0.2]}, "give exactly one"),
    ],
)
def test_bounds_that_no_value_keeps_are_refused(bound: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_constraints([row("compliance_rate", bound=bound)], "c.toml")


def test_a_rate_may_have_to_lie_between_two_limits_and_the_worst_of_many_may_not() -> None:
    (c,) = read_constraints([row("refusal_rate", bound={"between": [0.2, 0.6]})], "c.toml")
    assert [c.bound.keeps(x) for x in (0.1, 0.2, 0.5, 0.7)] == [False, True, True, False]
    assert [c.bound.too_high(x) for x in (0.1, 0.7)] == [False, True]
    assert c.bound.as_row() == {"between": [0.2, 0.6]}
    assert "has one limit" in refused(row(bound={"between": [0.2, 0.6]}))


def test_two_constraints_that_contradict_each_other_are_refused() -> None:
    wants = row("accuracy", id="a", bound={"at_least": 0.9})
    denies = row("accuracy", id="b", bound={"at_most": 0.5})
    with pytest.raises(RecipeError, match="a and b contradict each other: .* at least 0.9, .* at most 0.5"):
        read_constraints([wants, denies], "c.toml")
    elsewhere = {**denies, "prompts": {"generator": "workshop.harmful"}}
    assert len(read_constraints([wants, elsewhere], "c.toml")) == 2
    assert len(read_constraints([wants, {**denies, "bound": {"at_most": 0.95}}], "c.toml")) == 2
