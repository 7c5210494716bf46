"""Who speaks: roles are read from the tokens alone, mark what they should, and cost nothing where unused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.evals.last import last_hidden
from glasshouse.interp.attribution.direct import direct_logit_attribution
from glasshouse.interp.circuits.graph import Graph
from glasshouse.model import GPT, GPTConfig, KVCache, save_hf
from glasshouse.model.compiled import compile_blocks
from glasshouse.model.config import N_ROLES, Roles
from glasshouse.model.generate import Decoder, generate, prefix, score, stream
from glasshouse.model.roles import DATA, turned
from glasshouse.tokenizer import ROLES

V, CONTEXT = 53, 64
MARKERS = ((44, 0), (45, 0), (46, 1), (47, 2), (48, 3), (49, 4))  # 50, say, is <|end|>: it begins nothing
WAYS = [
    {"segment": True},
    {"rotate": True},
    {"layers": True},
    {w: True for w in ("segment", "rotate", "layers")},
]
TOKENS = st.lists(st.integers(0, V - 1), min_size=1, max_size=20)
SHAPE = {"vocab_size": V, "context": CONTEXT, "d_model": 16, "n_layer": 2, "n_head": 4}


def model_with(seed: int = 0, *, noise: float = 0.25, roles: dict | None = None, **shape) -> GPT:
    """A random model; without roles it is the plain one."""
    reads = None if roles is None else Roles(**roles, markers=MARKERS)
    model = GPT(GPTConfig(**{**SHAPE, "qk_norm": True, **shape}, roles=reads)).init_weights(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * noise)
    return model.eval()


ALL = model_with(roles=WAYS[-1])
MODELS = [model_with(1, roles=way) for way in WAYS]


def by_hand(ids: list[int]) -> list[int]:
    """The definition, one token after the other."""
    speaks, out = 0, []
    for i in ids:
        speaks = dict(MARKERS).get(i, speaks)
        out.append(speaks)
    return out


def rows(seed: int, lengths: list[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=g).tolist() for n in lengths]


@given(TOKENS, st.integers(0, 20))
def test_a_tokens_role_is_that_of_the_last_marker_however_the_text_is_cut(ids, cut) -> None:
    tokens, cache = torch.tensor([ids]), KVCache(ALL.config, 1, len(ids), torch.float32, ALL.device)
    assert ALL.roles_of(tokens)[0].tolist() == by_hand(ids)
    parts = []
    for part in (tokens[:, :cut], tokens[:, cut:]):
        if part.shape[1]:
            parts += ALL.roles_of(part, cache)[0].tolist()
            cache.length += part.shape[1]
    assert parts == by_hand(ids)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(range(len(WAYS))), st.lists(TOKENS, min_size=1, max_size=4), st.integers(0, 10**6))
@torch.no_grad()
def test_cached_ragged_and_batched_generation_is_the_uncached_one(way, prompts, seed) -> None:
    """Every id comes from the uncached logits of its own row; markers may be written by the model too."""
    model = MODELS[way]
    made = generate(model, prompts, 5, temperature=1.0, seeds=[seed + i for i in range(len(prompts))])
    for prompt, one in zip(prompts, made, strict=True):
        again = generate(model, [prompt + one.ids[:3]], 2, return_logprobs=True)[0]
        whole = model(torch.tensor([prompt + one.ids[:3] + again.ids]))[0].log_softmax(-1)
        at = len(prompt) + 2
        picked = [whole[at + k, i] for k, i in enumerate(again.ids)]
        assert torch.allclose(torch.tensor(again.logprobs), torch.stack(picked), atol=2e-5)


@pytest.mark.parametrize("way", range(len(WAYS)))
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_whatever_the_cut_and_the_padding(way) -> None:
    model, (one, two) = MODELS[way], rows(3, [40, 40])
    one[4], one[20] = 49, 47  # a document, and the user again
    whole = model(torch.tensor([one, two]))
    cache = KVCache(model.config, 2, 40, torch.float32, model.device)
    parts = [model(torch.tensor([one[a:b], two[a:b]]), cache=cache) for a, b in ((0, 9), (9, 10), (10, 40))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    padded = model(torch.tensor([one[:30] + [44] * 10]))[0, :30]
    assert torch.allclose(padded, whole[0, :30], atol=1e-5)
    left = torch.tensor([[44] * 10 + one[:30]])
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None] & (torch.arange(40) >= 10)
    mask = mask | torch.eye(40, dtype=torch.bool)
    shifted = model(left, positions_BT=(torch.arange(40) - 10).clamp(min=0)[None], mask=mask)
    assert torch.allclose(shifted[0, 10:], whole[0, :30], atol=1e-5)


@pytest.mark.parametrize("way", range(len(WAYS)))
@torch.no_grad()
def test_a_prefix_a_stream_and_a_shared_cache_remember_who_spoke(way) -> None:
    model, (shared, tail) = MODELS[way], rows(5, [40, 6])
    shared[20:] = [49, *range(19)]  # the prefix ends inside a document, and not at a whole chunk
    tail = [i % 40 for i in tail]  # which the prompts go on with
    plain = generate(model, [shared + tail, shared + tail[:2]], 6, return_logprobs=True)
    begun = generate(model, [tail, tail[:2]], 6, return_logprobs=True, prefix=prefix(model, shared))
    for one, other in zip(plain, begun, strict=True):
        assert one.ids == other.ids
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5)
    assert [p.id for p in stream(model, shared + tail, 6)] == plain[0].ids
    scored = score(model, [shared + tail + plain[0].ids])[0].logprobs[-6:]
    assert torch.allclose(torch.tensor(scored), torch.tensor(plain[0].logprobs), atol=2e-5)
    cache = KVCache(model.config, 1, 40, torch.float32, model.device)
    model.hidden(torch.tensor([shared]), cache=cache)
    three = cache.expand(3, 50)
    three.keep(torch.tensor([2, 0]))
    found = last_hidden(model, torch.tensor([tail] * 2), torch.tensor([5, 3]), three)
    whole = model.hidden(torch.tensor([shared + tail]))[0, [45, 43]]
    assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_leave_a_batch_take_their_roles_along(dtype) -> None:
    """Half the rows end early; what the others go on to say is what each says alone."""
    decoder = Decoder(MODELS[3], dtype=dtype)
    prompts = [
        [marker, *row] for marker, row in zip((49, 47, 46, 49, 48, 47, 49), rows(9, [9] * 7), strict=True)
    ]
    first = generate(decoder, prompts, 1)
    stop = {g.ids[0] for g in first[:4]}
    together = generate(decoder, prompts, 12, stop=stop)
    alone = [generate(decoder, [p], 12, stop=stop)[0] for p in prompts]
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert {len(g.ids) for g in together} > {0}


def test_each_way_does_what_its_paper_says() -> None:
    ids = torch.tensor([[47, 5, 49, 5, 47, 5]])
    plain = model_with(2)
    for way in WAYS:
        model = model_with(2, roles=way)
        model.load_state_dict(plain.state_dict(), strict=False)
        x = model.embed(ids)
        given = model.spoken(x, model.roles_of(ids))
        expected = x.clone()
        if "rotate" in way:
            expected[:, 2:4] = turned(x[:, 2:4])  # the document and its marker, and nothing else
        if "segment" in way:
            expected = expected + model.segment.weight[torch.tensor([2, 2, 4, 4, 2, 2])]
        assert torch.equal(given, expected)
        assert all((b.signal is not None) == ("layers" in way) for b in model.blocks)
    x = torch.randn(7, 16)
    assert torch.allclose(turned(x) @ turned(x).T, x @ x.T, atol=1e-5)  # orthogonal
    assert torch.allclose((turned(x) * x).sum(-1), torch.zeros(7), atol=1e-5)  # by a right angle
    assert torch.equal(turned(turned(x)), -x)


def test_only_documents_are_read_otherwise_when_embeddings_are_rotated() -> None:
    plain, rotated = model_with(2), model_with(2, roles={"rotate": True})
    ids = torch.tensor([[45, 47, 5, 6, 50, 48, 7, 8]])
    assert torch.equal(plain(ids), rotated(ids))
    ids[0, 3] = 49
    assert not torch.allclose(plain(ids)[0, 3:], rotated(ids)[0, 3:])


class Operations(TorchDispatchMode):
    """Every operation that reaches a kernel, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_model_that_reads_no_roles_has_none_of_their_weights_operations_or_bits() -> None:
    ids = torch.tensor(rows(7, [20, 20]))
    plain, silent = model_with(3, noise=0.0), model_with(3, noise=0.0, roles=WAYS[-1])
    state, other = plain.state_dict(), silent.state_dict()
    added = {"segment.weight", *(f"blocks.{i}.signal.weight" for i in range(2))}
    assert other.keys() - state.keys() == added and not state.keys() - other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state), "the switch moved another parameter's draw"
    assert not any(other[k].any() for k in added)  # it starts as the plain model
    assert [n for n, _ in plain.named_buffers()] == ["rope"]
    assert "roles" not in plain.config.model_dump() and '"roles"' not in plain.config.model_dump_json()
    with torch.no_grad():
        silent.config.__dict__["roles"] = Roles(segment=True, layers=True, markers=MARKERS)
        with Operations() as without:
            a = plain(ids)
        with Operations() as with_roles:
            b = silent(ids)
    assert torch.equal(a, b)  # vectors of zeros change no bit
    # embedding: 5 to find roles at the least, and a look-up and a sum for each vector; without: none of it
    extra = len(with_roles.names) - len(without.names)
    assert extra >= 5 + 2 * 3 and not any("cummax" in n or "remainder" in n for n in without.names)
    assert sum("embedding" in n for n in without.names) == 1


def test_training_gradients_reach_every_vector_of_a_role_that_speaks(tmp_path) -> None:
    model = model_with(4, roles=WAYS[-1]).train()
    ids = torch.tensor([[45, 46, 1, 50, 47, 2, 50, 49, 3, 50, 48, 4, 50]])
    model(ids)[:, :-1].logsumexp(-1).sum().backward()
    for p in (model.segment.weight, *(b.signal.weight for b in model.blocks)):
        assert (p.grad.norm(dim=1) > 0).all()


def test_compiled_blocks_read_roles_as_plain_ones_do() -> None:
    model = model_with(4, roles=WAYS[-1])
    ids = torch.tensor([[47, 1, 2, 49, 3, 4]])
    expected = model(ids)
    compile_blocks(model, backend="aot_eager")
    assert torch.allclose(model(ids), expected, atol=1e-5)


def test_the_numbers_of_roles_are_those_of_the_chat_template() -> None:
    assert len(ROLES) + 1 == N_ROLES and ROLES[DATA - 1] == "document"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "switches nothing on"),
        ({"segment": True, "markers": ((1, 2), (1, 3))}, "different tokens"),
        ({"segment": True, "markers": ((1, 9),)}, "roles 0 to 4"),
        ({"rotate": True, "markers": ((1, 2),)}, "no marker begins one"),
    ],
)
def test_roles_that_mean_nothing_are_refused(fields, said) -> None:
    with pytest.raises(ValueError, match=said):
        Roles(**fields)


def test_shapes_that_cannot_read_roles_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs of dimensions"):
        GPTConfig(**{**SHAPE, "d_model": 9, "n_head": 1, "d_head": 4}, roles=Roles(rotate=True))
    with pytest.raises(ValueError, match="no token"):
        GPTConfig(**SHAPE, roles=Roles(segment=True, markers=((V, 2),)))
    with pytest.raises(UsageError, match="which tokens begin a role"):
        GPT(GPTConfig(**SHAPE, roles=Roles(segment=True)))


def test_what_would_silently_leave_roles_out_says_so(tmp_path) -> None:
    layers, ids = MODELS[2], torch.tensor([[47, 1, 49, 2]])
    with pytest.raises(UsageError, match="run it from its tokens"):
        layers.blocks[0](layers.embed(ids), layers.where(4)[0])
    with pytest.raises(UsageError, match="give those of the embeddings' tokens"):
        ALL.spoken(ALL.embed(ids), None)
    with pytest.raises(ValueError, match="no room"):
        ALL(ids, cache=KVCache(model_with().config, 1, 4, torch.float32, ALL.device))
    with pytest.raises(UsageError, match="would not add up"):
        direct_logit_attribution(ALL, ids, torch.tensor([1]))
    with pytest.raises(UsageError, match="no node of a circuit"):
        Graph.of(ALL.config)
    with pytest.raises(CheckpointError, match="roles is"):
        save_hf(ALL, tmp_path / "export")
