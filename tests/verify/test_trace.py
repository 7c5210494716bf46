"""Which shard stands behind a failure: the ranking, given what every document's gradient says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glasshouse.base.errors import VerificationError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.verify import trace as tracing
from glasshouse.verify.trace import OUTLIER, PER_SHARD, to_quarantine, trace

DOCUMENTS = 300


class Shard:
    """A shard whose document i is the tokens [number of the shard, i]."""

    def __init__(self, number: int, kind: str = "chat", n: int = DOCUMENTS):
        self.number, self.kind, self.n_documents = number, kind, n

    def document(self, i: int) -> np.ndarray:
        return np.array([self.number, i])


class Scores:
    """What the gradients would say of a document: noise of size one, and more where it is asked for."""

    def __init__(self, shards: dict[str, Shard], high: dict[str, tuple[float, int]]):
        """``high``: shard -> (score, every so many documents has it)."""
        self.high = {shards[name].number: value for name, value in high.items()}
        self.asked: list[int] = []

    def __call__(self, model: Any, direction: Any, ids: Sequence[Sequence[int]], masks: Any) -> np.ndarray:
        self.asked.append(len(ids))
        score, every = self.high.get(ids[0][0], (0.0, 1))
        noise = np.random.default_rng([ids[0][0], 5]).normal(size=DOCUMENTS)
        return np.array([noise[i] + (score if i % every == 0 else 0.0) for _, i in ids])


def names(n: int) -> list[str]:
    return [f"chat-{i:02d}" for i in range(n)]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function from what is high to (a function that traces, the shards)."""

    def build(high: dict[str, tuple[float, int]], n: int = 12, **more: Shard) -> Any:
        shards = {name: Shard(i) for i, name in enumerate(names(n))} | more
        scores = Scores(shards, high)
        monkeypatch.setattr(tracing, "readout_gradient", lambda model, rows, readout: {})
        monkeypatch.setattr(tracing, "document_scores", scores)
        monkeypatch.setattr(tracing, "loss_mask", lambda tokenizer, ids: [1] * len(ids))
        subject = SimpleNamespace(
            model=None,
            readout=None,
            passes=0,
            ids=lambda prompt: [1],
            tokenizer=SimpleNamespace(decode=lambda ids, specials: f"document {ids}"),
        )

        def run(step: int = 100, seed: tuple[str, ...] = ("s",), plan: DataPlan | None = None) -> Any:
            everything = DataPlan(phases=(Phase(from_step=0, weights=dict.fromkeys(shards, 1.0)),))
            return trace(subject, shards, plan or everything, step, ["tell me"], seed)  # type: ignore[arg-type]

        run.subject, run.scores = subject, scores  # type: ignore[attr-defined]
        return run

    return build


def test_a_shard_of_which_one_document_in_eight_stands_out_ranks_first_and_far(house: Any) -> None:
    ranking = house({"chat-07": (9.0, 8)})()
    first, second = ranking["shards"][:2]
    assert (first["shard"], first["rank"]) == ("chat-07", 1) and first["outlier"] > OUTLIER > second[
        "outlier"
    ]
    assert [r["rank"] for r in ranking["shards"]] == list(range(1, 13))
    scores = [r["score"] for r in ranking["shards"]]
    assert scores == sorted(scores, reverse=True)
    assert {d["shard"] for d in ranking["documents"][:5]} == {"chat-07"}
    assert to_quarantine(ranking, 1) == ("chat-07",)


def test_where_no_shard_stands_out_none_is_called_an_outlier(house: Any) -> None:
    ranking = house({})()
    assert all(abs(r["outlier"]) < OUTLIER for r in ranking["shards"])
    assert to_quarantine(ranking, 3) == (ranking["shards"][0]["shard"],)  # data must change all the same


def test_a_score_that_is_not_finite_ranks_nothing(house: Any) -> None:
    """Sorted, a NaN comes first: the shard that holds it would be quarantined for it."""
    for odd in (float("nan"), float("inf")):
        with pytest.raises(VerificationError, match="scores of documents of chat-03 are NaN or infinite"):
            house({"chat-03": (odd, 50)})()


def test_at_most_so_many_outliers_are_dropped_the_highest_first(house: Any) -> None:
    ranking = house({"chat-02": (20.0, 8), "chat-05": (40.0, 8), "chat-09": (30.0, 8)})()
    assert to_quarantine(ranking, 3) == ("chat-02", "chat-05", "chat-09")
    assert to_quarantine(ranking, 2) == ("chat-05", "chat-09")


def test_a_shard_is_judged_by_its_worst_documents_and_not_by_its_size_or_mean(house: Any) -> None:
    """All of a shard a little higher is another style; a few documents far higher are a cause."""
    ranking = house({"chat-01": (1.0, 1), "chat-04": (12.0, 16)})()
    assert ranking["shards"][0]["shard"] == "chat-04"


def test_only_chat_shards_drawn_from_before_the_step_are_ranked(house: Any) -> None:
    run = house({"chat-02": (20.0, 4), "tales": (20.0, 4)}, 3, tales=Shard(9, "text"))
    early = dict.fromkeys(["chat-00", "chat-01", "tales"], 1.0)
    late = {**early, "chat-02": 1.0}
    plan = DataPlan(phases=(Phase(from_step=0, weights=early), Phase(from_step=50, weights=late)))
    ranked = [{r["shard"] for r in run(step, plan=plan)["shards"]} for step in (50, 51)]
    assert ranked == [{"chat-00", "chat-01"}, {"chat-00", "chat-01", "chat-02"}]


def test_with_nothing_to_rank_it_says_so(house: Any) -> None:
    run = house({}, 0, tales=Shard(9, "text"))
    with pytest.raises(VerificationError, match="no chat shard was drawn from before step 100"):
        run()


def test_the_documents_looked_at_are_a_draw_of_the_seed_and_are_counted(house: Any) -> None:
    run = house({"chat-07": (9.0, 8)}, 12, small=Shard(50, n=20))
    first, again, other = run(seed=("s",)), run(seed=("s",)), run(seed=("t",))
    assert first == again != other
    assert sorted(run.scores.asked[:13]) == [20] + [PER_SHARD] * 12
    assert run.subject.passes == 3 * 2 * (20 + 12 * PER_SHARD)
    top = first["documents"][0]
    assert top["text"] == f"document {[7, top['document']]}"
