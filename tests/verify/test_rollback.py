"""Where a run goes back to: before the quarantined data's first batch, and never to what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.plan import DataPlan, Phase
from glasshouse.train import Checkpoint, Decision, GateRecord
from glasshouse.verify.rollback import rollback_target

BOOKS = DataPlan(phases=(Phase(from_step=0, weights={"books": 1.0}),))
EARLY = DataPlan(phases=(Phase(from_step=0, weights={"a": 1.0, "b": 1.0}),))
LATE = DataPlan(
    phases=(
        Phase(from_step=0, weights={"a": 1.0, "b": 1.0, "bad": 0.0}),
        Phase(from_step=100, weights={"a": 1.0, "b": 1.0, "bad": 1.0}),
    )
)
PLANS = {0: BOOKS, 1: EARLY, 2: LATE}
STAGES = ("pretrain", "sft", "tune")


def at(stage: int, step: int, attempt: int = 0) -> Checkpoint:
    name = f"{STAGES[stage]}-{step:06d}.{attempt}"
    return Checkpoint(name, Path(name), STAGES[stage], stage, step, attempt, 0, PLANS[stage], "d" * 64)


def record(stage: int, step: int, *statuses: str, live: bool = True, attempt: int = 0) -> GateRecord:
    """A checkpoint with a gate's verdicts; without statuses no gate was asked."""
    verdicts: tuple[dict[str, Any], ...] = tuple({"status": s, "constraint": "c"} for s in statuses)
    decision = Decision("continue", "", verdicts=verdicts) if statuses else None
    return GateRecord(at(stage, step, attempt), decision, live, 0 if statuses else None)


RUN = (
    record(0, 0),
    record(0, 200),
    record(1, 180),  # saved between gates, never judged
    record(1, 360, "pass", "not_applicable"),
    record(2, 80, "pass"),
)


def target(history: tuple[GateRecord, ...], failed: Checkpoint, *dropped: str) -> str | None:
    found = rollback_target(history, failed, dropped)
    return None if found is None else found.name


def test_it_is_the_last_sound_checkpoint_before_the_first_batch() -> None:
    assert target(RUN, at(2, 160), "bad") == "tune-000080.0"


def test_a_checkpoint_after_the_first_batch_does_not_count_however_sound() -> None:
    history = (*RUN, record(2, 160, "pass"), record(2, 240, "undecided"))
    assert target(history, at(2, 320), "bad") == "tune-000080.0"


def test_a_checkpoint_saved_at_the_very_step_of_the_first_batch_has_not_seen_it() -> None:
    history = (*RUN, record(2, 100, "pass"), record(2, 101, "pass"))
    assert target(history, at(2, 160), "bad") == "tune-000100.0"


@pytest.mark.parametrize("status", ["fail", "error"])
def test_a_failing_checkpoint_is_passed_over(status: str) -> None:
    history = (*RUN[:-1], record(2, 80, "pass", status))
    assert target(history, at(2, 160), "bad") == "sft-000360.0"


def test_a_shard_drawn_from_in_an_earlier_stage_sends_the_run_back_before_that_stage() -> None:
    """No gate was asked at the end of pretraining; it is still the only place that never saw the data."""
    assert target(RUN, at(2, 160), "a") == "pretrain-000200.0"
    assert target(RUN, at(2, 160), "bad", "a") == "pretrain-000200.0"


def test_data_of_the_very_first_step_sends_the_run_back_to_its_start() -> None:
    assert target(RUN, at(2, 160), "books") == "pretrain-000000.0"


def test_an_unjudged_checkpoint_within_a_stage_is_no_place_to_go_back_to() -> None:
    assert target((*RUN, record(2, 90)), at(2, 160), "bad") == "tune-000080.0"


def test_abandoned_attempts_do_not_count() -> None:
    history = (*RUN[:-1], record(2, 80, "pass", live=False), record(2, 80, "pass", attempt=1))
    assert target(history, at(2, 160, 1), "bad") == "tune-000080.1"
    history = (*RUN[:-1], record(2, 80, "pass", live=False))
    assert target(history, at(2, 80, 1), "bad") == "sft-000360.0"


def test_without_a_sound_checkpoint_before_it_the_stage_begins_again() -> None:
    history = (record(0, 0), record(0, 200, "fail"), record(1, 360, "fail"))
    assert target(history, at(2, 80), "a") == "pretrain-000000.0"  # the run's start never failed
    assert target(history[1:], at(2, 80), "a") == "sft-000360.0"  # nothing is sound: the stage's start


def test_without_any_ancestor_there_is_nowhere_to_go() -> None:
    assert target((), at(0, 80), "books") is None
    assert target((record(0, 40, "pass", live=False),), at(0, 80), "books") is None


STATUS = st.sampled_from(["pass", "fail", "undecided", "not_applicable", "error"])
HISTORY = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.lists(STATUS, max_size=2), st.booleans()), max_size=12
)


@settings(max_examples=300)
@given(HISTORY, st.sets(st.sampled_from(["books", "a", "b", "bad"]), min_size=1))
def test_whatever_happened_the_place_is_live_and_as_sound_as_can_be(
    rows: list[tuple[int, int, list[str], bool]], dropped: set[str]
) -> None:
    places = sorted({(stage, 10 * step): (statuses, live) for stage, step, statuses, live in rows}.items())
    history = tuple(record(stage, step, *s, live=live) for (stage, step), (s, live) in places)
    failed = at(2, 401)
    found = rollback_target(history, failed, dropped)
    live = [r for r in history if r.live]
    assert (found is None) == (not live)
    if found is None:
        return
    assert found in [r.checkpoint for r in live]

    def unseen(c: Checkpoint) -> bool:
        """Nothing dropped was drawn from before this checkpoint: said step by step."""
        past = [
            (s, k)
            for s in range(3)
            for k in range(c.step if s == c.stage_index else 401)
            if s <= c.stage_index
        ]
        used = {s for s in {r.checkpoint.stage_index for r in live} | {2}}
        return not any(set(PLANS[s].at(k).active) & dropped for s, k in past if s in used)

    sound = [
        r.checkpoint
        for r in live
        if r.decision is not None
        and not any(v["status"] in ("fail", "error") for v in r.decision.verdicts)
        and unseen(r.checkpoint)
    ]
    if sound:
        order = [r.checkpoint.name for r in live]
        assert unseen(found)
        assert order.index(found.name) >= order.index(sound[-1].name)
