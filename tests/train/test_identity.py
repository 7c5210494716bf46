from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.errors import RecipeError, TrainingError, UsageError
from glasshouse.base.ledger import Ledger
from glasshouse.train.identity import IDENTITY, check_environment, enter_run, environment
from train.tiny import open_ledger

NOW = environment(1, "fp32", "fp32")


def enter(ledger: Ledger, recipe: str = "r", now: dict[str, Any] = NOW, **more: Any) -> dict[str, Any]:
    return enter_run(ledger, recipe_digest=recipe, environment=now, **more)


def test_the_environment_names_all_that_changes_bits() -> None:
    assert set(IDENTITY) <= NOW.keys()
    assert NOW["torch"] and NOW["cpu_capability"] and NOW["cpu"]
    assert check_environment(NOW, environment(1, "fp32", "fp32"), allow_change=False) == []


@pytest.mark.parametrize("key", IDENTITY)
def test_a_change_is_refused_and_named(key: str) -> None:
    changed = NOW | {key: "other"}
    with pytest.raises(TrainingError, match=f"{key}: was .*is 'other'"):
        check_environment(NOW, changed, allow_change=False)
    assert len(check_environment(NOW, changed, allow_change=True)) == 1


def test_what_does_not_change_bits_may_change() -> None:
    assert check_environment(NOW, NOW | {"python": "4.0", "system": "elsewhere"}, allow_change=False) == []


def test_entry_zero_commits_recipe_environment_and_what_the_caller_adds(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    enter(ledger, body={"constraints": {"c": "digest"}})
    (entry,) = ledger.entries()
    assert entry["kind"] == "run" and entry["body"]["recipe"] == "r"
    assert entry["body"]["constraints"] == {"c": "digest"} and entry["body"]["environment"] == NOW


def test_a_run_is_entered_again_only_to_resume_it_with_the_same_recipe(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    enter(ledger)
    with pytest.raises(UsageError, match="--resume"):
        enter(ledger)
    with pytest.raises(RecipeError, match="recipe changed"):
        enter(ledger, "other", resume=True)
    assert enter(ledger, resume=True)["recipe"] == "r"
    assert len(ledger) == 1


def test_an_allowed_change_is_ledgered_and_then_expected(tmp_path: Path) -> None:
    ledger, moved = open_ledger(tmp_path), NOW | {"threads": 2}
    enter(ledger)
    with pytest.raises(TrainingError, match="threads: was 1, is 2"):
        enter(ledger, now=moved, resume=True)
    enter(ledger, now=moved, resume=True, allow_change=True)
    assert ledger.entries("resume")[0]["body"]["changes"] == ["threads: was 1, is 2"]
    enter(ledger, now=moved, resume=True)
    assert len(ledger) == 2


def test_a_stop_is_not_overridden_before_there_is_one(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    enter(ledger)
    with pytest.raises(UsageError, match="has not stopped"):
        enter(ledger, resume=True, after_stop="me")
    assert len(ledger) == 1
