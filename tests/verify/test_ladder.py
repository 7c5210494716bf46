"""The acting ladder and the split of error levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import RecipeError
from glasshouse.verify.ladder import GateConfig, asked_by, levels
from glasshouse.verify.schema import Constraint, read_constraints
from verify.test_gate import constraint, gate, verdict
from verify.test_rollback import at
from verify.test_schema import row


def asked(c: Constraint, **about: Any) -> str:
    return asked_by(c, verdict("fail", **about), required=False, final=False)


def test_a_ladder_climbs_with_failures_in_a_row_and_stays_on_its_last_step() -> None:
    c = constraint(on_fail=["warn", "hold", "rollback", "stop"])
    assert [asked(c, failures=k) for k in range(1, 7)] == ["warn", "hold", "rollback", "stop", "stop", "stop"]
    assert asked(constraint(on_fail="rollback"), failures=5) == "rollback"


def test_a_ladder_that_would_grow_milder_or_do_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="grows milder"):
        constraint(on_fail=["rollback", "hold"])
    with pytest.raises(RecipeError, match="empty list"):
        constraint(on_fail=[])
    with pytest.raises(RecipeError, match="no action 'explode'.*Known: log, warn"):
        constraint(on_fail=["hold", "explode"])


def test_a_ladder_that_may_end_in_a_block_blocks_on_what_is_not_known() -> None:
    c = constraint(on_fail=["log", "hold"])
    assert asked_by(c, verdict("error"), required=False, final=False) == "hold"
    never = constraint(on_fail=["log", "warn"])
    assert asked_by(never, verdict("error"), required=True, final=True) == "log"


def test_a_status_no_check_can_have_goes_to_a_person() -> None:
    assert asked_by(constraint(), verdict("splendid"), required=False, final=True) == "stop"


def test_a_warning_goes_on_with_gates_twice_as_frequent(tmp_path: Path) -> None:
    g = gate(tmp_path, constraint(on_fail=["warn", "hold"]))
    decide = lambda failures: g.decide(None, at(2, 80), (), [verdict("fail", failures=failures)], 0, False)  # noqa: E731  # type: ignore[arg-type]
    assert (decide(1).action, decide(1).densify) == ("continue", GateConfig().densify)
    assert "suppression warns" in decide(1).reason
    assert (decide(2).action, decide(2).densify) == ("hold", 1)


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.sampled_from(["log", "warn", "hold", "rollback"])), min_size=1),
    st.floats(1e-4, 0.4),
)
def test_blocking_constraints_together_never_have_more_than_the_gates_level(
    rows: list[tuple[float, str]], alpha: float
) -> None:
    made = [row(id=f"c{k}", weight=w, on_fail=f, alpha=0.4) for k, (w, f) in enumerate(rows)]
    found = read_constraints(made, "c.toml")
    share = levels(found, alpha)
    assert sum(share[c.id] for c in found if c.blocking) <= alpha * (1 + 1e-9)
    assert all(share[c.id] == c.alpha for c in found if not c.blocking)
    assert levels(found, None) == {c.id: c.alpha for c in found}


def test_weights_say_who_gets_more_of_the_level_and_no_one_more_than_its_own() -> None:
    made = [row(id="a", weight=3.0, alpha=0.4), row(id="b", alpha=0.4), row(id="c", alpha=0.001)]
    found = levels(read_constraints(made, "c.toml"), 0.05)
    assert found == pytest.approx({"a": 0.03, "b": 0.01, "c": 0.001})
