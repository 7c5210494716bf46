from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model import GPT, KVCache
from glasshouse.model.generate import Decoder, Sampling, generate, last_logits

RAGGED = [[1, 2, 3, 4, 5, 6, 7], [9], [50, 3, 3], [5, 4, 3, 2, 1, 0, 7], [8, 8, 8, 8]]
PROMPTS = st.lists(st.lists(st.integers(0, 52), min_size=1, max_size=20), min_size=1, max_size=5)
RELAXED = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def new_cache(model: GPT, batch: int, size: int) -> KVCache:
    return KVCache(model.config, batch, size, torch.float32, torch.device("cpu"))


@torch.no_grad()
def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_cached_decoding_equals_full_forward(any_model):
    tokens = torch.randint(0, 53, (3, 20), generator=torch.Generator().manual_seed(0))
    full = any_model(tokens)
    cache = new_cache(any_model, 3, 20)
    pieces = [
        any_model(tokens[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 20))
    ]
    assert cache.length == 20
    assert close(torch.cat(pieces, dim=1), full)


@torch.no_grad()
def test_a_shared_prefix_continues_like_the_whole_sequence(any_model):
    tokens = torch.randint(0, 53, (4, 18), generator=torch.Generator().manual_seed(1))
    tokens[:, :11] = tokens[:1, :11]
    prefix = new_cache(any_model, 1, 11)
    any_model(tokens[:1, :11], cache=prefix)
    rest = any_model(tokens[:, 11:], cache=prefix.expand(4, 18))
    assert close(rest, any_model(tokens)[:, 11:])
    assert prefix.length == 11, "the prefix itself must stay usable"


def test_a_cache_refuses_what_it_cannot_hold(tiny):
    model, row = tiny(), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="cache of 2 positions"):
        model(row, cache=new_cache(model, 1, 2))
    with pytest.raises(ValueError, match="cache of 4 rows"):
        model(row, cache=new_cache(model, 4, 8))
    with pytest.raises(ValueError, match="one row"):
        new_cache(model, 2, 8).expand(4, 8)
    filled = new_cache(model, 1, 8)
    model(row, cache=filled)
    with pytest.raises(ValueError, match="prefix of 3"):
        filled.expand(2, 2)


def test_greedy_batches_write_what_each_prompt_alone_writes(any_model):
    expected = [greedy_without_cache(any_model, p, 9) for p in RAGGED]
    assert [g.ids for g in generate(any_model, RAGGED, 9)] == expected
    assert [g.ids for g in generate(any_model, RAGGED, 9, batch_size=2)] == expected
    assert len({tuple(e) for e in expected}) > 1


def test_samples_do_not_depend_on_batch_mates(any_model):
    how = {"temperature": 1.3, "top_k": 30, "top_p": 0.95}
    seeds = [11, 12, 13, 14, 15]
    together = generate(any_model, RAGGED, 12, seeds=seeds, **how)
    alone = [generate(any_model, [p], 12, seeds=[s], **how)[0] for p, s in zip(RAGGED, seeds, strict=True)]
    backwards = generate(any_model, RAGGED[::-1], 12, seeds=seeds[::-1], **how)[::-1]
    assert [g.ids for g in together] == [g.ids for g in alone] == [g.ids for g in backwards]
    other = generate(any_model, RAGGED, 12, seeds=[s + 100 for s in seeds], **how)
    assert [g.ids for g in other] != [g.ids for g in together]


def test_a_prompt_that_stands_there_several_times_is_read_once_and_answered_as_alone(any_model):
    class Counting(Decoder):
        def prefill(self, prompts, cache):
            read.extend(prompts)
            return super().prefill(prompts, cache)

    read: list[list[int]] = []
    prompts = [p for p in RAGGED for _ in range(3)]
    how = {"temperature": 1.0, "return_logprobs": True, "stop": (7, 8)}
    together = generate(Counting(any_model), prompts, 9, seeds=range(len(prompts)), **how)
    assert sorted(read) == sorted(RAGGED)
    for i, (prompt, made) in enumerate(zip(prompts, together, strict=True)):
        assert [made] == generate(any_model, [prompt], 9, seeds=[i], **how)


def test_equal_prompts_with_different_seeds_differ(tiny):
    made = generate(tiny(), [[1, 2]] * 8, 10, temperature=2.0, seeds=range(8))
    assert len({tuple(g.ids) for g in made}) > 4


@RELAXED
@given(
    prompts=PROMPTS,
    shape=st.sampled_from(["grouped", "gpt2"]),
    stops=st.sets(st.integers(0, 52), max_size=20),
)
def test_any_ragged_batch_with_any_stops_equals_one_at_a_time(tiny, prompts, shape, stops):
    model = tiny(shape)
    for made, prompt in zip(generate(model, prompts, 6, stop=stops), prompts, strict=True):
        ids = greedy_without_cache(model, prompt, 6)
        cut = next((i for i, token in enumerate(ids) if token in stops), None)
        assert made.ids == ids[:cut]
        assert made.stopped == (cut is not None)


def test_a_stop_token_ends_its_own_row_only(tiny):
    model = tiny("grouped")
    free = generate(model, RAGGED, 8)
    stop = free[0].ids[3]
    halted = generate(model, RAGGED, 8, stop={stop})
    assert halted[0].stopped and stop not in halted[0].ids
    for a, b in zip(free, halted, strict=True):
        assert b.ids == a.ids[: len(b.ids)]
        assert len(b.ids) == 8 or a.ids[len(b.ids)] == stop


@torch.no_grad()
def test_logprobs_are_those_of_the_full_forward(any_model):
    for made, prompt in zip(generate(any_model, RAGGED, 5, return_logprobs=True), RAGGED, strict=True):
        whole = torch.tensor([prompt + made.ids])
        logp = any_model(whole).log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logp.gather(-1, torch.tensor(made.ids)[:, None]).squeeze(-1)
        assert torch.allclose(torch.tensor(made.logprobs), expected, atol=1e-5)


def test_sampling_frequencies_match_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    for temperature in (0.5, 1.0, 3.0):
        drawn = Sampling(temperature).choose(logits, uniforms).bincount(minlength=4) / 20_000
        assert torch.allclose(drawn.float(), (logits[0] / temperature).softmax(-1), atol=0.015)


def test_top_k_and_top_p_keep_the_smallest_sufficient_set():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(2_000, 4)
    uniforms = (torch.arange(2_000, dtype=torch.float64) / 2_000).numpy()
    for sampling, kept in (
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_p=0.5), {1}),
        (Sampling(1.0, top_p=0.76), {1, 3, 2}),
        (Sampling(1.0, top_k=3, top_p=0.8), {1, 3}),  # filters in this order: 0.5 + 0.25 is 0.83 of the three
        (Sampling(1.0), {0, 1, 2, 3}),
    ):
        assert set(sampling.choose(logits, uniforms).tolist()) == kept


def test_nothing_asked_nothing_done(tiny):
    model = tiny()
    assert generate(model, [], 5) == []
    assert generate(model, [[1]], 0)[0].ids == []
    assert last_logits(model, []).shape == (0, 53)


@pytest.mark.parametrize(
    ("prompts", "new", "options", "message"),
    [
        ([[1], []], 3, {}, "prompt 1 is empty"),
        ([[1, 53]], 3, {}, "token 53, outside the vocabulary of 53"),
        ([[-1]], 3, {}, "token -1"),
        ([[1] * 30], 3, {}, "at most 2"),
        ([[1]], -1, {}, "negative"),
        ([[1]], 3, {"temperature": 1.0}, "needs seeds"),
        ([[1]], 3, {"temperature": 1.0, "seeds": [1, 2]}, "2 seeds for 1"),
        ([[1]], 3, {"temperature": math.nan, "seeds": [1]}, "temperature"),
        ([[1]], 3, {"temperature": -1.0, "seeds": [1]}, "temperature"),
        ([[1]], 3, {"temperature": 1.0, "seeds": [1], "top_k": 0}, "top_k"),
        ([[1]], 3, {"temperature": 1.0, "seeds": [1], "top_p": 0.0}, "top_p"),
        ([[1]], 3, {"top_k": 5}, "no effect at temperature 0"),
        ([[1]], 3, {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_done_is_said(tiny, prompts, new, options, message):
    with pytest.raises(UsageError, match=message):
        generate(tiny(), prompts, new, **options)


def test_the_context_may_be_filled_exactly(tiny):
    assert len(generate(tiny("gpt2"), [[1] * 30, [2]], 2)[0].ids) == 2


def test_damaged_weights_do_not_generate(tiny):
    model = tiny()
    model.blocks[1].mlp.up.weight.data[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, [[1, 2]], 2)
    with pytest.raises(CheckpointError, match="not finite"):
        last_logits(model, [[1, 2]])


@RELAXED
@given(prompts=PROMPTS, batch_size=st.integers(1, 3))
def test_last_logits_of_ragged_prompts_are_the_full_forwards(tiny, prompts, batch_size):
    model = tiny("grouped")
    got = last_logits(model, prompts, batch_size=batch_size)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([p]))[0, -1] for p in prompts])
    assert close(got, expected)
    assert not got.requires_grad


def test_last_logits_apply_edits(tiny):
    model = tiny()
    plain = last_logits(model, RAGGED)
    ablated = last_logits(model, RAGGED, edit={"blocks.1.resid_post": torch.zeros_like})
    assert not torch.allclose(plain, ablated)
    with pytest.raises(UsageError, match="no site"):
        last_logits(model, RAGGED, edit={"blocks.9.resid_post": torch.zeros_like})
