"""Batches are pure functions of (seed, step, plan), and deal data fairly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora import SOURCE, chat_documents, packed
from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.data import ChatBatches, Corpus, NextTokenBatches, Shards, pack, prepare
from glasshouse.tokenizer import Tokenizer, loss_mask, parse


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Shards, Tokenizer]:
    return packed(tmp_path_factory.mktemp("loader") / "data")


def same(a: Batch, b: Batch) -> bool:
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "targets", "weight"))
    return arrays and a.shards == b.shards and a.n_bytes == b.n_bytes


def dealt(tok: Tokenizer, batch: Batch) -> list[str]:
    """What the user said in each row: names the document."""
    return [parse(tok, [*row, tok.end], unfinished=True)[0]["content"] for row in _rows(tok, batch)]


def _rows(tok: Tokenizer, batch: Batch) -> list[list[int]]:
    return [[int(i) for i in row if i != tok.pad] for row in batch.tokens]


CHATS = ["chat-a", "chat-b", "chat-c"]


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 5))
def test_a_batch_can_be_drawn_alone_and_again(data, step: int, seed: int) -> None:
    shards, tok = data
    for kind, names in ((NextTokenBatches, ["tales", "more"]), (ChatBatches, CHATS)):
        plan = shards.plan(names)
        used = kind(shards, tok, seed, 4, 64)
        used.batch(3, plan)
        fresh = kind(Shards.open(shards.folder), tok, seed, 4, 64)
        assert same(used.batch(step, plan), fresh.batch(step, plan))
        assert not same(used.batch(step, plan), used.batch(step + 1, plan))
        assert not same(used.batch(step, plan), kind(shards, tok, seed + 1, 4, 64).batch(step, plan))


def test_windows_are_pieces_of_the_shards_with_the_next_token_as_target(data) -> None:
    shards, tok = data
    batch = NextTokenBatches(shards, tok, 0, 8, 16).batch(5, shards.plan(["tales", "more"]))
    stream = {name: np.asarray(shards[name].tokens, dtype=np.int64) for name in ("tales", "more")}
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        whole = [*tokens, targets[-1]]
        assert list(tokens[1:]) == list(targets[:-1])
        windows = (np.lib.stride_tricks.sliding_window_view(s, 17) for s in stream.values())
        assert any((w == whole).all(axis=1).any() for w in windows)
    assert (
        batch.tokens.shape == (8, 16) and batch.tokens.dtype == np.int64 and batch.weight.dtype == np.float32
    )


def test_bytes_are_those_of_the_weighted_targets_and_separators_weigh_nothing(data) -> None:
    shards, tok = data
    for step in range(10):
        batch = NextTokenBatches(shards, tok, 0, 8, 32).batch(step, shards.plan(["tales"]))
        assert ((batch.targets == tok.bos) == (batch.weight == 0)).all()
        weighted = batch.targets[batch.weight > 0].tolist()
        assert batch.n_bytes == sum(len(tok.bytes_of(i)) for i in weighted)


def test_shards_are_drawn_in_proportion_to_their_weights(data) -> None:
    shards, tok = data
    plan = shards.plan(weights={"tales": 3.0, "more": 1.0})
    loader = NextTokenBatches(shards, tok, 0, 1, 16)
    drawn = Counter(loader.batch(step, plan).shards for step in range(2000))
    # Binomial(2000, 3/4) has a standard deviation of 19.4; five of them.
    assert abs(drawn[("tales",)] - 1500) < 97 and drawn[("tales",)] + drawn[("more",)] == 2000


def test_a_quarantined_shard_is_not_drawn_from_its_step_on_and_earlier_steps_do_not_change(data) -> None:
    shards, tok = data
    for kind, names, gone in ((NextTokenBatches, ["tales", "more"], "more"), (ChatBatches, CHATS, "chat-b")):
        loader = kind(shards, tok, 0, 8, 64)
        before = shards.plan(names)
        after = before.without([gone], from_step=7)
        assert all(same(loader.batch(s, before), loader.batch(s, after)) for s in range(7))
        assert any(gone in loader.batch(s, before).shards for s in range(7))
        assert not any(gone in loader.batch(s, after).shards for s in range(7, 60))


def test_every_conversation_comes_once_an_epoch(data) -> None:
    shards, tok = data
    plan, loader = shards.plan(CHATS), ChatBatches(shards, tok, 0, 8, 64)
    assert loader.epoch_length(0, plan) == 40
    rows = [name for step in range(15) for name in dealt(tok, loader.batch(step, plan))]
    epochs = [rows[k : k + 40] for k in (0, 40, 80)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_epochs(data) -> None:
    shards, tok = data
    plan, loader = shards.plan(CHATS), ChatBatches(shards, tok, 0, 7, 64)
    rows = [name for step in range(40) for name in dealt(tok, loader.batch(step, plan))]
    assert set(Counter(rows).values()) == {7}


def test_weights_of_chat_shards_are_their_share_of_the_rows(data) -> None:
    shards, tok = data
    plan, loader = shards.plan(weights={"chat-a": 1.5, "chat-c": 1.0}), ChatBatches(shards, tok, 0, 5, 64)
    # chat-a: 10 documents at three times the rate of chat-c's 20.
    assert loader.epoch_length(0, plan) == 50
    rows = Counter(name for step in range(10) for name in dealt(tok, loader.batch(step, plan)))
    assert {n for name, n in rows.items() if name.startswith("a")} == {3}
    assert {n for name, n in rows.items() if name.startswith("c")} == {1}
    # 2.5 times: each twice, and half of them once more, another half in another epoch.
    plan = shards.plan(weights={"chat-a": 1.25, "chat-c": 1.0})
    assert loader.epoch_length(0, plan) == 45
    rows = Counter(name for step in range(9) for name in dealt(tok, loader.batch(step, plan)))
    assert sorted(n for name, n in rows.items() if name.startswith("a")) == [2] * 5 + [3] * 5


def test_a_row_is_one_whole_conversation_with_the_answer_weighted(data) -> None:
    shards, tok = data
    batch = ChatBatches(shards, tok, 0, 6, 64).rows([("chat-a", 3), ("chat-c", 7)])
    for row, (name, i) in enumerate((("chat-a", 3), ("chat-c", 7))):
        ids = shards[name].document(i)
        n = len(ids) - 1
        assert batch.tokens[row, :n].tolist() == ids[:-1].tolist()
        assert batch.targets[row, :n].tolist() == ids[1:].tolist()
        assert batch.weight[row, :n].tolist() == loss_mask(tok, ids.tolist())[1:]
        assert (batch.tokens[row, n:] == tok.pad).all() and not batch.weight[row, n:].any()
    assert batch.tokens.shape[1] % 8 == 0 and batch.shards == ("chat-a", "chat-c")
    answers = [chat_documents(20, tag)[i].parts[1] for tag, i in (("a", 3), ("c", 7))]
    assert batch.n_bytes == sum(len(answer.encode()) for answer in answers)


def test_validation_batches_never_change_and_do_not_overlap(data) -> None:
    shards, tok = data
    texts = NextTokenBatches(shards, tok, 0, 2, 16)
    first = texts.validation(["held-out"], 3)
    other_seed = NextTokenBatches(shards, tok, 9, 2, 16).validation(["held-out"], 3)
    assert len(first) == 3 and all(same(a, b) for a, b in zip(first, other_seed, strict=True))
    everything = texts.validation(["held-out"], 10**6)
    seen = np.concatenate([b.tokens for b in everything]).reshape(-1)
    assert seen.tolist() == shards["held-out"].tokens[: len(seen)].tolist()
    chats = ChatBatches(shards, tok, 0, 4, 64).validation(CHATS, 100)
    rows = [name for batch in chats for name in dealt(tok, batch)]
    assert len(rows) == len(set(rows)) == 40


def test_few_documents_still_give_one_validation_batch(data) -> None:
    shards, tok = data
    (batch,) = ChatBatches(shards, tok, 0, 64, 64).validation(["chat-a"], 5)
    assert len(batch.tokens) == 10


def test_what_does_not_fit_is_refused(data, tmp_path: Path) -> None:
    shards, tok = data
    with pytest.raises(DataError, match="fewer than one window of 100001"):
        NextTokenBatches(shards, tok, 0, 2, 100_000).batch(0, shards.plan(["tales"]))
    with pytest.raises(DataError, match="never cut silently"):
        ChatBatches(shards, tok, 0, 2, 8)
    with pytest.raises(DataError, match="holds chat; this stage draws text"):
        NextTokenBatches(shards, tok, 0, 2, 8).batch(0, shards.plan(["chat-a"]))
    with pytest.raises(DataError, match="no shard 'tails'. Did you mean 'tales'"):
        NextTokenBatches(shards, tok, 0, 2, 8).batch(
            0, DataPlan(phases=(Phase(from_step=0, weights={"tails": 1.0}),))
        )
    with pytest.raises(DataError, match="at least 1"):
        NextTokenBatches(shards, tok, 0, 0, 8)
    with pytest.raises(DataError, match="another tokenizer"):
        NextTokenBatches(shards, Tokenizer.train(["x"], 262), 0, 2, 8)


def test_data_that_the_plan_was_not_made_for_is_refused(data, tmp_path: Path) -> None:
    shards, tok = data
    other = pack(tmp_path / "d", tok, prepare([Corpus("chat-a", chat_documents(10, "z"), (SOURCE,))]))
    with pytest.raises(DataError, match="not what the data plan was made for"):
        ChatBatches(other, tok, 0, 2, 64).batch(0, shards.plan(["chat-a"]))
