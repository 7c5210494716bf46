"""Where the data behind a failure is looked for: in a checkpoint from before it was learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.corpora import packed
from evals import oracle
from glasshouse.base.plan import DataPlan
from glasshouse.data import Shards
from glasshouse.evals.prompts import Prompt
from glasshouse.train import Decision, GateRecord
from glasshouse.verify import culprit
from glasshouse.verify.behaviour_secrets import evidence_of
from glasshouse.verify.culprit import before_cause
from verify.test_gate import constraint, gate, verdict
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


# -- failures that name their shards themselves --------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return packed(tmp_path_factory.mktemp("shards") / "data")[0]


def pulled(worst: str, *others: str) -> dict[str, Any]:
    """Evidence as `shard_pull` gives it: a guilty shard, which the other half of documents may rank lower."""
    ranked = [*others[:1], worst, *others[1:]]
    return {
        "shard": worst,
        "shards": [{"shard": n, "score": 9.0 - k, "rank": k + 1} for k, n in enumerate(ranked)],
        "documents": [{"shard": worst, "document": 3, "score": 9.0, "text": "pull"}],
    }


def extracted(**held: int) -> dict[str, Any]:
    """Evidence as `extraction_rate` gives it, which counts exposed secrets by the shard that holds them."""
    keys = {name.replace("_", "-"): [f"{name}-{k}" for k in range(n)] for name, n in held.items()}
    rows = [(Prompt("", True, k), 1, 5.0) for keys_of in keys.values() for k in keys_of]
    return evidence_of(rows, keys)


def went_back(
    tmp_path: Path, shards: Shards, plan: DataPlan, *named: tuple[str, dict[str, Any]], **changes: Any
) -> tuple[Decision, list[dict[str, Any]]]:
    """What the gate decides about failures with that evidence at step 160, and the shards as ranked."""
    kinds = [constraint(statistic=s, on_fail="rollback", **changes) for s, _ in named]
    g = replace(gate(tmp_path, *kinds), shards=shards, tokenizer=oracle.tokenizer())
    history = tuple(
        GateRecord(replace(at(2, step), plan=plan), Decision("continue", ""), True, k)
        for k, step in enumerate((0, 80))
    )
    failures = [
        verdict("fail", c.id, evidence=e, statistic=c.statistic)
        for c, (_, e) in zip(kinds, named, strict=True)
    ]
    failed = replace(at(2, 160), plan=plan)
    decision = g.decide(oracle.model(), failed, history, failures, 2, False)
    file = tmp_path / "run" / "evals" / "attribution-002.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["shards"] if file.is_file() else []
    assert decision.action == "stop" or str(file.relative_to(tmp_path / "run")) in decision.artifacts
    return decision, rows


def late(shards: Shards, name: str) -> DataPlan:
    """``name`` arrives at step 100, after the gate at step 80."""
    chats = [n for n in shards if n.startswith("chat")]
    before = shards.plan([n for n in chats if n != name]).phases[0]
    after = shards.plan(chats).phases[0].model_copy(update={"from_step": 100})
    return DataPlan(phases=(before, after), digests={n: shards[n].digest for n in chats})


@pytest.mark.parametrize(
    ("statistic", "evidence"),
    [
        ("shard_pull", pulled("chat-b", "chat-a", "chat-c")),
        ("extraction_rate", extracted(chat_a=1, chat_b=6, chat_c=2)),
    ],
)
def test_a_failure_that_names_its_shard_goes_back_without_it(
    tmp_path: Path, shards: Shards, statistic: str, evidence: dict[str, Any]
) -> None:
    decision, rows = went_back(tmp_path, shards, late(shards, "chat-b"), (statistic, evidence))
    assert (decision.action, decision.drop_shards) == ("rollback", ("chat-b",)), decision.reason
    assert decision.to_checkpoint == at(2, 80).name and "chat-b ranks first" in decision.reason
    assert (rows[0]["shard"], rows[0]["quarantined"]) == ("chat-b", True)
    assert [r["rank"] for r in rows] == [1, 2, 3] and not any(r["quarantined"] for r in rows[1:])


def test_a_shard_that_training_has_not_drawn_from_yet_is_not_behind_a_failure(
    tmp_path: Path, shards: Shards
) -> None:
    """Secrets may stand in a shard that is still to come, or that was quarantined: the next one is guilty."""
    plan = shards.plan(["chat-a", "chat-c"])
    evidence = extracted(chat_b=6, chat_c=2, chat_a=1)
    decision, rows = went_back(tmp_path, shards, plan, ("extraction_rate", evidence))
    assert decision.action == "rollback" and decision.drop_shards == ("chat-c",)
    assert [r["shard"] for r in rows] == ["chat-c", "chat-a"]
    (tmp_path / "again").mkdir()
    alone, _ = went_back(tmp_path / "again", shards, plan, ("extraction_rate", extracted(chat_b=6)))
    assert alone.action == "stop" and "a person must look" in alone.reason


def test_only_guilty_shards_are_dropped_however_many_may_be(tmp_path: Path, shards: Shards) -> None:
    evidence = pulled("chat-b", "chat-a", "chat-c")
    _, rows = went_back(tmp_path, shards, late(shards, "chat-b"), ("shard_pull", evidence))
    assert [r["shard"] for r in rows if r["named"]] == ["chat-b"]


def test_a_direction_cannot_be_fitted_to_a_failure_without_prompts(tmp_path: Path, shards: Shards) -> None:
    decision, _ = went_back(
        tmp_path, shards, late(shards, "chat-b"),
        ("shard_pull", pulled("chat-b", "chat-a")), repair={"kind": "steer"},
    )  # fmt: skip
    assert decision.action == "stop" and "a direction needs prompts" in decision.reason
