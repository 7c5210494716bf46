"""The decoder computes what the model computes, and a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.model import GPT
from glasshouse.model.decode import CHUNK, Decoder, packs
from glasshouse.model.generate import generate, prefix, score
from model.shapes import FITTING

VARIANTS: dict[str, tuple[str, dict]] = {
    **FITTING,
    "ours": ("ours", {}),
    "one-kv-head": ("one-kv-head", {}),
    "value-residual": ("ours", {"value_residual": True}),
    "no-norm": ("gpt2", {"norm": "none"}),
    "softcap": ("ours", {"attn_softcap": 2.0, "logit_softcap": 2.0}),
}
LONG = {"context": 128}


def texts(seed: int, lengths: list[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 53, (n,), generator=g).tolist() for n in lengths]


def logits_along(decoder: Decoder, prompts: list[list[int]], new: list[list[int]]) -> torch.Tensor:
    """Logits [step, row, V] while ``new`` ids are fed to each prompt; prompts longest first."""
    cache = decoder.cache(len(prompts), len(prompts[0]) + len(new[0]))
    out = [decoder.logits(decoder.prefill(prompts, cache))]
    for step in range(len(new[0])):
        out.append(decoder.logits(decoder.step(torch.tensor([n[step] for n in new]), cache)))
    return torch.stack(out)


@pytest.mark.parametrize("name", sorted(VARIANTS))
@torch.no_grad()
def test_the_decoder_equals_the_model_for_every_feature(tiny, name):
    shape, changes = VARIANTS[name]
    model = tiny(shape, **{**changes, **LONG})
    prompts, new = texts(1, [70, 33, 32, 5, 1]), texts(2, [4] * 5)
    got = logits_along(Decoder(model), prompts, new)
    for row, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
        whole = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 :]
        assert (got[:, row] - whole).abs().max() <= 2e-5 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("name", sorted(VARIANTS))
@torch.no_grad()
def test_the_bf16_decoder_is_as_close_to_fp32_as_the_bf16_model(tiny, name):
    shape, changes = VARIANTS[name]
    exact = tiny(shape, **{**changes, **LONG})
    prompts, new = texts(3, [40, 33, 25, 17, 9, 3]), texts(4, [3] * 6)
    got = logits_along(Decoder(exact, dtype=torch.bfloat16), prompts, new)
    coarse = tiny(shape, **{**changes, **LONG}).to(torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for row, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
        tokens = torch.tensor([prompt + ids])
        whole = exact(tokens)[0, len(prompt) - 1 :]
        ours += float((got[:, row] - whole).square().mean())
        theirs += float((coarse(tokens)[0, len(prompt) - 1 :].float() - whole).square().mean())
    assert ours <= 2 * theirs + 1e-6  # of squares: 1.4 times the error


def big(tiny, **changes) -> GPT:
    """Wide enough that kernels split their work as they do on models in use."""
    return tiny("gpt2", d_model=192, n_head=6, n_layer=2, d_mlp=3072, vocab_size=211, context=256, **changes)


@pytest.mark.skipif(not packs(torch.device("cpu"), torch.bfloat16), reason="no bf16 in this CPU's oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_logits_are_the_same_bits_with_and_without_batch_mates(tiny, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, changes in (("gpt2", {}), ("window", {"window_tokens": 20})):
            decoder = Decoder(big(tiny, **changes), dtype=dtype)
            prompts, new = texts(5, [130, 64, 63, 40, 7, 2, 1]), texts(6, [5] * 7)
            together = logits_along(decoder, prompts, new)
            for row in (0, 2, 5, 6):
                alone = logits_along(decoder, [prompts[row]], [new[row]])[:, 0]
                assert torch.equal(together[:, row], alone), (name, row)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["ours", "grouped", "one-kv-head", "narrow"])
def test_samples_and_logprobs_are_bitwise_the_sequences_own_on_many_seeds(tiny, shape, dtype):
    narrow = {"shape": "one-kv-head", "n_kv_head": 4}  # lone queries of width 6: kernels of their own
    model = tiny(**(narrow if shape == "narrow" else {"shape": shape}), **LONG)
    decoder = Decoder(model, dtype=dtype)
    prompts = texts(7, [3, 40, 12, 33, 1, 5, 100, 8] * 3)
    how = {"temperature": 1.2, "top_p": 0.95, "min_p": 0.01, "return_logprobs": True}
    seeds = list(range(100, 124))
    together = generate(decoder, prompts, 10, seeds=seeds, **how)
    pairs = generate(decoder, prompts, 10, seeds=seeds, batch_size=3, **how)
    alone = [generate(decoder, [p], 10, seeds=[s], **how)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone == pairs


def test_a_shared_prefix_changes_no_bit(tiny):
    decoder = Decoder(tiny("grouped", **LONG))
    begin = texts(8, [2 * CHUNK + 9])[0]
    ends = texts(9, [5, 1, 20, 3])
    whole = [begin + e for e in ends]
    how = {"temperature": 1.0, "seeds": [1, 2, 3, 4], "return_logprobs": True}
    alone = [
        generate(decoder, [p], 8, **{**how, "seeds": [s]})[0]
        for p, s in zip(whole, (1, 2, 3, 4), strict=True)
    ]
    shared = prefix(decoder, begin)
    assert generate(decoder, ends, 8, prefix=shared, **how) == alone, "given"
    assert generate(decoder, whole, 8, **how) == alone, "found by itself"
    assert generate(decoder, [[]], 8, prefix=shared) == generate(decoder, [begin], 8)
    assert shared.cache.lengths == [len(begin)], "it can be used again"


def test_a_shared_prefix_is_read_once(tiny, monkeypatch):
    decoder = Decoder(tiny("ours", **LONG))
    begin = texts(10, [3 * CHUNK])[0]
    read: list[int] = []
    hidden = decoder._hidden
    monkeypatch.setattr(decoder, "_hidden", lambda t, c: read.append(t.numel()) or hidden(t, c))
    generate(decoder, [[*begin, i] for i in range(6)], 1)
    assert sum(read) == 3 * CHUNK + 6 * CHUNK


def test_a_prefix_belongs_to_its_model(tiny):
    model = tiny("ours")
    shared = prefix(model, [1, 2, 3])
    assert generate(model, [[4]], 3, prefix=shared) == generate(model, [[1, 2, 3, 4]], 3)
    with pytest.raises(UsageError, match="another model"):
        generate(tiny("gpt2"), [[4]], 3, prefix=shared)


@torch.no_grad()
def test_scores_are_the_models_log_probabilities(any_model):
    sequences = texts(11, [9, 2, 1, 20])
    for sequence, got in zip(sequences, score(any_model, sequences, top=2, batch_size=3), strict=True):
        logp = any_model(torch.tensor([sequence]))[0].log_softmax(-1)
        expected = [float(logp[i, t]) for i, t in enumerate(sequence[1:])]
        assert got.logprobs == pytest.approx(expected, abs=1e-5)
        assert got.greedy == [int(logp[i].argmax()) == t for i, t in enumerate(sequence[1:])]
        assert got.top is not None and len(got.top) == len(sequence) - 1
        for i, best in enumerate(got.top):
            assert [t for t, _ in best] == logp[i].topk(2).indices.tolist()


def test_scores_agree_with_what_generation_reports(tiny):
    model = tiny("grouped")
    made = generate(model, [[1, 2, 3], [4]], 6, temperature=1.5, seeds=[1, 2], return_logprobs=True)
    for prompt, g in zip([[1, 2, 3], [4]], made, strict=True):
        echo = score(model, [prompt + g.ids])[0].logprobs[len(prompt) - 1 :]
        assert g.logprobs == pytest.approx(echo, abs=1e-5)


def test_a_model_that_sees_ahead_does_not_generate(tiny):
    model = tiny("ours", causal=False)
    with pytest.raises(UsageError, match="later positions"):
        generate(model, [[1]], 2)
    with pytest.raises(UsageError, match="later positions"):
        score(model, [[1, 2]])
