"""The decoding cache: rows of their own lengths, whole spans, prefixes."""

from __future__ import annotations

import pytest
import torch

from glasshouse.model.cache import SlotCache
from glasshouse.model.decode import CHUNK, Decoder


def new(tiny, rows: int, size: int) -> SlotCache:
    return SlotCache(tiny("grouped").config, rows, size, torch.float32, torch.device("cpu"))


def test_reads_are_whole_spans_and_views(tiny):
    cache = new(tiny, 3, 200)
    assert cache.size == 256
    for filled, end in ((1, 128), (128, 128), (129, 192), (256, 256)):
        k, _ = cache.read(0, 2, filled)
        assert k.shape == (2, 2, end, 4) and k.data_ptr() == cache.k[0].data_ptr()


def test_keeping_rows_moves_lengths_with_them(tiny):
    cache = new(tiny, 3, 10)
    cache.lengths = [5, 3, 2]
    cache.k[1][2] += 7
    cache.keep([2, 0])
    assert cache.lengths == [2, 5] and cache.rows == 2
    assert bool((cache.k[1][0] == 7).all()) and not cache.k[1][1].any()


def test_a_prefix_is_one_row_that_is_filled_and_fits(tiny):
    cache = new(tiny, 2, 64)
    with pytest.raises(ValueError, match="one row"):
        cache.put_prefix(new(tiny, 2, 64), 1)
    with pytest.raises(ValueError, match="0 are filled"):
        cache.put_prefix(new(tiny, 1, 64), 1)


def test_prompts_are_read_longest_first_and_after_whole_chunks(tiny):
    decoder = Decoder(tiny("grouped", context=128))
    with pytest.raises(ValueError, match="longest first"):
        decoder.prefill([[1], [1, 2]], decoder.cache(2, 8))
    cache = decoder.cache(1, 100)
    cache.lengths = [CHUNK + 1]
    with pytest.raises(ValueError, match="longest first"):
        decoder.prefill([[1] * 90], cache)
