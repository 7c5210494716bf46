"""Stop strings, streaming, filters and what cannot be asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import UsageError
from glasshouse.model.generate import Decoder, Sampling, generate, stream
from glasshouse.model.stops import StopText

# Ids 0..52 as text: several characters a token, an empty one, and one character split over two tokens.
PIECES = [f"{chr(97 + i % 26)}{chr(65 + i // 2)}".encode() for i in range(50)] + [b"", b"\xc3", b"\xa9"]


def decode(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(tiny):
    model = tiny("grouped")
    free = generate(model, [[1, 2]], 12, decode=decode)[0]
    assert free.text == decode(free.ids) and not free.stopped and free.stopped_by is None
    at = 7
    string = free.text[at : at + 4]  # begins and ends inside tokens
    first = free.text.index(string)
    made = generate(model, [[1, 2]], 12, stop_text=[string], decode=decode, return_logprobs=True)[0]
    assert made.stopped and made.stopped_by == string
    assert made.text == free.text[:first]
    assert made.ids == free.ids[: len(made.ids)] and free.text.startswith(decode(made.ids))
    assert len(decode(made.ids)) <= first and len(made.logprobs) == len(made.ids)


def test_rows_stop_apart(tiny):
    model = tiny("ours")
    prompts = [[1, 2], [9], [3, 4, 5], [7, 7]]
    free = generate(model, prompts, 10, decode=decode)
    string = free[2].text[4:7]
    for a, b in zip(free, generate(model, prompts, 10, stop_text=[string], decode=decode), strict=True):
        assert b.text == a.text.split(string)[0]


def test_the_first_stop_string_counts_and_the_longest_on_ties():
    finder = StopText(["bb", "abb", "a"], lambda ids: "".join("xab"[i] for i in ids))
    assert finder.find([0, 1]) == ("a", 1, "x")
    finder = StopText(["bb", "abb"], lambda ids: "".join("xab"[i] for i in ids))
    assert finder.find([0, 1, 2]) is None
    assert finder.find([0, 1, 2, 2]) == ("abb", 1, "x")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(st.integers(0, 52), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    cut=st.tuples(st.integers(0, 18), st.integers(1, 4)),
    stops=st.sets(st.integers(0, 52), max_size=6),
)
def test_streamed_pieces_join_to_what_generate_returns(tiny, prompt, seed, cut, stops):
    model = Decoder(tiny("grouped"))
    how = {"temperature": 1.5, "decode": decode, "stop": stops}
    free = generate(model, [prompt], 9, seeds=[seed], **how)[0].text or "-"
    string = free[cut[0] : cut[0] + cut[1]] or free[:1]
    for strings in ([], [string], [string, "zz"]):
        made = generate(model, [prompt], 9, seeds=[seed], stop_text=strings, return_logprobs=True, **how)[0]
        pieces = list(stream(model, prompt, 9, seed=seed, stop_text=strings, **how))
        assert "".join(p.text for p in pieces) == made.text
        assert [p.id for p in pieces][: len(made.ids)] == made.ids
        assert [p.logprob for p in pieces][: len(made.ids)] == made.logprobs


def test_streaming_does_not_wait_for_the_end(tiny):
    pieces = stream(tiny("ours"), [1, 2], 20, decode=decode)
    first = next(pieces)
    assert first.id == generate(tiny("ours"), [[1, 2]], 1)[0].ids[0]
    pieces.close()


def test_streaming_shows_nothing_it_would_take_back():
    finder = StopText(["STOP"], decode)
    assert finder.showable("abcST") == "abc"
    assert finder.showable("abcSTx") == "abcSTx"
    assert finder.showable("caf\ufffd") == "caf"


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.2, 0.05]])).expand(2_000, 4)
    uniforms = np.arange(2_000) / 2_000
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.45, {0, 1}), (1.0, {0})):
        assert set(Sampling(1.0, min_p=min_p).choose(logits, uniforms).tolist()) == kept


def test_filtered_tokens_are_never_drawn_at_the_very_ends():
    logits = torch.tensor([[0.0, 5.0, 0.0, 0.0]])
    for u in (0.0, np.nextafter(1.0, 0.0)):
        assert Sampling(1.0, top_k=1).choose(logits, np.array([u])).tolist() == [1]


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1e4, 2e4, 1.9e4]])
    assert Sampling(1e-300).choose(logits, np.array([0.5])).tolist() == [1]


def test_top_logprobs_are_the_likeliest_of_each_step(tiny):
    model = tiny("ours")
    made = generate(model, [[1, 2], [3]], 5, top_logprobs=3, return_logprobs=True)
    for g in made:
        assert g.top is not None and g.logprobs is not None
        for token, logprob, best in zip(g.ids, g.logprobs, g.top, strict=True):
            assert best[0] == (token, logprob) and len(best) == 3
            assert [v for _, v in best] == sorted((v for _, v in best), reverse=True)
    assert generate(model, [[1]], 3)[0].top is None


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny):
    model = tiny("ours")
    made = generate(model, [[1]] * 20, 10, temperature=5.0, seeds=range(20), vocab=40)
    assert max(max(g.ids) for g in made) < 40
    assert any(max(g.ids) >= 40 for g in generate(model, [[1]] * 20, 10, temperature=5.0, seeds=range(20)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_text": ["x"]}, "need decode"),
        ({"stop_text": [""], "decode": decode}, "empty"),
        ({"temperature": 1.0, "seeds": [1], "min_p": 1.5}, "min_p"),
        ({"temperature": 1.0, "seeds": [1], "min_p": math.nan}, "min_p"),
        ({"min_p": 0.1}, "no effect at temperature 0"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"vocab": 54}, "54 tokens and the model 53"),
    ],
)
def test_what_cannot_be_done_is_said(tiny, options, message):
    with pytest.raises(UsageError, match=message):
        generate(tiny(), [[1]], 3, **options)


def test_streaming_refuses_the_same(tiny):
    for prompt, options, message in (
        ([], {}, "empty"),
        ([1], {"temperature": 1.0}, "needs a seed"),
        ([1] * 31, {}, "exceeds"),
    ):
        with pytest.raises(UsageError, match=message):
            next(stream(tiny(), prompt, 5, **options))
