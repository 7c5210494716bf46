from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.base.errors import UsageError
from glasshouse.interp.reading import Shuffle, StoreWriter
from glasshouse.interp.reading.store import ActivationStore

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=7)


@given(sizes=SIZES, batch=st.integers(1, 15), pool=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_epoch_visits_every_vector_once(sizes, batch, pool, seed):
    n = sum(sizes)
    order = Shuffle(sizes, batch, seed, pool=pool)
    steps = -(-3 * n // batch)
    stream = np.concatenate([order(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(sizes=SIZES, batch=st.integers(1, 15), pool=st.integers(1, 40), steps=st.permutations(range(6)))
def test_a_batch_depends_on_seed_and_step_alone(sizes, batch, pool, steps):
    warm = Shuffle(sizes, batch, 1, pool=pool)
    for step in steps:
        assert np.array_equal(warm(step), Shuffle(sizes, batch, 1, pool=pool)(step))


def test_seeds_and_epochs_differ_and_the_order_is_shuffled():
    order = Shuffle([500, 500], 1000, 0)
    first, second = order(0), order(1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Shuffle([500, 500], 1000, 1)(0))
    ranks = np.corrcoef(first, np.arange(1000))[0, 1]
    assert abs(ranks) < 0.15
    assert 200 < (first[:500] < 500).sum() < 300, "shards of one pool are mixed"


def test_a_small_pool_never_reaches_for_more_than_its_shards():
    order = Shuffle([100] * 10, 50, 0, pool=200)
    for pool in range(5):
        numbers = np.concatenate([order(step) for step in range(4 * pool, 4 * pool + 4)])
        assert len(set(numbers // 100)) == 2


def test_nothing_to_shuffle_is_an_error():
    for sizes, batch in (([], 4), ([3], 0), ([3, 0], 2)):
        with pytest.raises(UsageError, match="shuffling needs vectors"):
            Shuffle(sizes, batch)
    with pytest.raises(UsageError, match="count from 0"):
        Shuffle([3], 1)(-1)


def test_a_stream_is_the_vectors_in_shuffled_order_from_any_step_on(tmp_path):
    numbers = torch.arange(100)
    with StoreWriter(tmp_path / "s", ["s", "t"], shard=16) as writer:
        acts = {"s": numbers[:, None, None].float().expand(-1, 1, 4), "t": -numbers[:, None, None].float()}
        writer.append(acts, numbers[:, None] % 7, numbers)
        writer.finish()
    store = ActivationStore(tmp_path / "s")
    found = [x[:, 0].long() for x in itertools.islice(store.stream("s", 30, seed=5, pool=20), 10)]
    assert sorted(torch.cat(found).tolist()) == sorted(list(range(100)) * 3)
    later = next(store.stream("s", 30, seed=5, pool=20, start=7))
    assert torch.equal(later[:, 0].long(), found[7])
    order = store.shuffle(30, 5, pool=20)
    assert torch.equal(store.read("t", order(7))[:, 0], -later[:, 0]), "two sites of the same vectors"
    assert torch.equal(store.tokens(order(7)), store.rows(order(7)) % 7)


LIMITED = """
import itertools, resource, sys
import torch
from glasshouse.interp.reading import ActivationStore, StoreWriter
folder, size = sys.argv[1], 2**20
with StoreWriter(folder, ["s"], shard=2**14) as writer:
    for mark in range(64):
        rows = torch.arange(mark * 2**12, (mark + 1) * 2**12)
        writer.append({"s": rows[:, None, None].float().expand(-1, 1, 256)}, rows[:, None] % 9, rows)
    writer.finish()
store = ActivationStore(folder)
now = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()  # data: not file pages
resource.setrlimit(resource.RLIMIT_DATA, (now + 64 * 2**20, now + 64 * 2**20))
try:
    store.read("s")
except (RuntimeError, MemoryError):
    print("whole: refused")
total = torch.zeros((), dtype=torch.float64)
for x in itertools.islice(store.stream("s", 4096, pool=2**16), 64):
    total += x[:, 0].double().sum()
print("streamed", int(total) == sum(range(2**18)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on memory that is enforced")
def test_a_store_larger_than_the_memory_allowed_streams(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split("\n")[:2] == ["whole: refused", "streamed True"], done.stderr
