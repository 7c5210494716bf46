from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.config import parse
from glasshouse.base.errors import DataError, RecipeError
from glasshouse.base.plan import DataPlan, Phase

NAMES = ["a", "b", "c", "d"]
weights = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.5, 1.0]), min_size=1).filter(
    lambda w: any(w.values())
)


@st.composite
def plans(draw: st.DrawFn) -> DataPlan:
    starts = sorted({0, *draw(st.lists(st.integers(1, 20), max_size=4))})
    return DataPlan(phases=tuple(Phase(from_step=start, weights=draw(weights)) for start in starts))


@given(plans(), st.sets(st.sampled_from(NAMES), min_size=1), st.integers(0, 25))
def test_without_changes_only_the_dropped_shards_and_only_from_that_step_on(
    plan: DataPlan, dropped: set[str], from_step: int
) -> None:
    dropped &= set(plan.shards)
    before = copy.deepcopy(plan)
    try:
        cut = plan.without(dropped, from_step)
    except DataError as error:
        assert "no data would be left" in str(error)
        later = range(from_step, 26)
        assert any(set(plan.at(step).active) <= dropped for step in later)
        return
    for step in range(26):
        expected = plan.at(step).weights
        if step >= from_step:
            expected = {name: 0.0 if name in dropped else w for name, w in expected.items()}
        assert cut.at(step).weights == expected
    assert plan == before
    assert cut.without(dropped, from_step) == cut


@given(plans(), st.sampled_from(NAMES))
def test_first_step_is_the_first_step_with_a_positive_weight(plan: DataPlan, shard: str) -> None:
    drawn = [step for step in range(26) if shard in plan.at(step).active]
    assert plan.first_step(shard) == (drawn[0] if drawn else None)


@given(plans())
def test_a_plan_survives_json_and_has_a_digest_and_a_hash(plan: DataPlan) -> None:
    again = parse(DataPlan, plan.model_dump(mode="json"), "plan")
    assert again == plan
    assert again.digest() == plan.digest()
    assert hash(again) == hash(plan)


def two() -> DataPlan:
    return DataPlan(
        phases=(
            Phase(from_step=0, weights={"books": 1.0, "chat": 0.0}),
            Phase(from_step=10, weights={"books": 1.0, "chat": 2.0}),
        ),
        digests={"books": "0" * 64, "chat": "1" * 64},
    )


def test_quarantine_cuts_a_phase_in_two_and_keeps_the_digests() -> None:
    cut = two().without(["chat"], 15)
    assert [phase.from_step for phase in cut.phases] == [0, 10, 15]
    assert cut.at(14).active == ("books", "chat")
    assert cut.at(15).active == ("books",)
    assert cut.digests == two().digests
    assert two().without("chat", 0).phases == (Phase(from_step=0, weights={"books": 1.0, "chat": 0.0}),)


def test_quarantining_everything_is_refused() -> None:
    with pytest.raises(DataError, match="no data would be left from step 3"):
        two().without(["books", "chat"], 3)
    with pytest.raises(DataError, match="no data would be left"):
        two().without(["books"], 3)


def test_a_misspelt_shard_is_refused_instead_of_quarantining_nothing() -> None:
    with pytest.raises(DataError, match="no shard 'chta'. Did you mean 'chat'"):
        two().without(["chta"], 3)


def test_a_plan_cannot_be_changed_in_place() -> None:
    plan = two()
    with pytest.raises(TypeError, match="frozen data"):
        plan.phases[1].weights["chat"] = 0.0
    with pytest.raises(TypeError, match="frozen data"):
        plan.digests.clear()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "start at step 0"),
        ([(1, {"a": 1.0})], "start at step 0"),
        ([(0, {"a": 1.0}), (0, {"a": 1.0})], "start at step 0 and rise"),
        ([(0, {"a": 1.0}), (5, {"a": 1.0}), (3, {"a": 1.0})], "rise"),
        ([(0, {"a": -1.0})], "'a' has weight -1.0"),
        ([(0, {"a": 1.0}), (4, {"a": 0.0})], "above 0 from step 4"),
    ],
)
def test_an_impossible_plan_is_refused(phases: list[tuple[int, dict[str, float]]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataPlan(phases=tuple(Phase(from_step=start, weights=w) for start, w in phases))


def test_a_weighted_shard_needs_a_digest_and_steps_start_at_zero() -> None:
    with pytest.raises(DataError, match="'b' has a weight but no digest"):
        DataPlan(phases=(Phase(from_step=0, weights={"a": 1.0, "b": 1.0}),), digests={"a": "0"})
    with pytest.raises(DataError, match="no step -1"):
        two().at(-1)
    with pytest.raises(RecipeError, match=r"weights\.a' should be a finite number"):
        parse(DataPlan, {"phases": [{"from_step": 0, "weights": {"a": float("inf")}}]}, "plan")
