"""Where the data behind a failure is looked for: in a checkpoint from before it was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from glasshouse.train import Decision, GateRecord
from glasshouse.verify import culprit
from glasshouse.verify.culprit import before_cause
from verify.test_rollback import at


class Scripted:
    """A subject that answers with prepared margins, by kind of prompt."""

    def __init__(self, name: str, reference: float, failing: float):
        self.name, self.answers = name, {"reference": reference, "failing": failing}

    def margins(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.answers[p] for p in prompts])

    def eval(self) -> Scripted:
        return self


def before(monkeypatch: pytest.MonkeyPatch, failing: tuple[float, float], *past: tuple[float, float]) -> str:
    """Which checkpoint is taken: "failed", or "000", "080", ... of ``past`` (oldest first; all judged)."""
    script = {
        step: Scripted(f"{step:03d}", *answers)
        for step, answers in zip(range(0, 800, 80), past, strict=False)
    }
    monkeypatch.setattr(culprit, "load_weights", lambda checkpoint: script[checkpoint.step])
    history = [GateRecord(at(2, step), Decision("continue", ""), True, 0) for step in script]
    failed = Scripted("failed", *failing)
    found = before_cause(failed, history, ["failing"], ["reference"], lambda model: model)  # type: ignore[arg-type, return-value]
    return found.name  # type: ignore[attr-defined,no-any-return]


def test_the_latest_ancestor_that_refuses_and_is_hardly_moved_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # margins of (reference, failing) prompts; the failing model is moved by 8
    assert before(monkeypatch, (4, -4), (0, 0), (4, 3.9), (4, 3), (4, -2)) == "160"


def test_an_ancestor_that_does_not_refuse_yet_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert before(monkeypatch, (4, -4), (0, 0), (1.9, 1.9)) == "failed"


def test_where_all_are_moved_the_least_moved_that_refuses_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documents' gradients are larger than those of the failing model, which has fitted them."""
    assert before(monkeypatch, (4, -4), (0, 0), (4, -1), (4, 1), (4, -3)) == "160"


def test_an_ancestor_moved_as_much_as_the_failing_model_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    assert before(monkeypatch, (4, -4), (4, -4), (5, -5)) == "failed"


def test_without_a_reference_or_an_ancestor_the_failing_model_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert before(monkeypatch, (4, -4)) == "failed"
    failed = Scripted("failed", 4, -4)
    record = GateRecord(at(2, 80), Decision("continue", ""), True, 0)
    assert before_cause(failed, [record], ["failing"], [], lambda model: model) is failed  # type: ignore[arg-type, return-value]


def test_what_was_abandoned_or_merely_saved_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(checkpoint: Any) -> Any:
        raise AssertionError(f"{checkpoint.name} was loaded")

    monkeypatch.setattr(culprit, "load_weights", refuse)
    history = [GateRecord(at(2, 80), None, False, 0), GateRecord(at(2, 40), None, True, None)]
    failed = Scripted("failed", 4, -4)
    found = before_cause(failed, history, ["failing"], ["reference"], lambda model: model)  # type: ignore[arg-type, return-value]
    assert found is failed  # type: ignore[comparison-overlap]
