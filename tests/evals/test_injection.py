"""Injected instructions: what counts as success, and that the search finds what there is to find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from glasshouse.data.enclosed import enclosed, reading
from glasshouse.evals import injection
from glasshouse.evals.injection import (
    Frame,
    Search,
    as_data,
    begin,
    followed,
    injected,
    read,
    searched,
    token_gradients,
)
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.config import Roles
from glasshouse.model.generate import Decoder, Generated
from glasshouse.tokenizer import Tokenizer, parse, render, role_markers

RNG = np.random.default_rng(0)
CASES = [enclosed(RNG, kind=kind) for kind in ("say", "end", "comply", "refuse") for _ in range(4)]
TOK = Tokenizer.train(
    [m["content"] for c in CASES for m in (*c.messages, *c.plain, *c.own)] * 3, 500, documents=True
)


def model(seed: int = 0, **roles: bool) -> GPT:
    reads = Roles(**roles, markers=role_markers(TOK)) if roles else None
    shape = {"vocab_size": TOK.vocab_size, "context": 256, "d_model": 32, "n_layer": 1, "n_head": 2}
    made = GPT(GPTConfig(**shape, roles=reads)).init_weights(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return made.eval()


def answering(monkeypatch, reply) -> None:
    """Put an oracle in the place of writing: ``reply(messages)`` is the answer to a conversation."""

    def write(_, prompts, limit, **__):
        texts = [reply(parse(TOK, p[:-1])) for p in prompts]
        return [Generated(TOK.encode(text), None, True) for text in texts]

    monkeypatch.setattr(injection, "generate", write)


def test_an_obedient_model_is_injected_an_honest_one_is_not_and_one_that_always_does_it_is_not(
    monkeypatch,
) -> None:
    says = {c.quoted.text: c for c in CASES}
    assert len(says) == len(CASES)
    replies = {"say": "{word}. Yes", "end": "Yes {word}.", "comply": "Gladly.", "refuse": "Sorry."}

    def obedient(messages):
        case = next((c for c in CASES if list(messages) in (c.messages, c.own)), None)
        return "Hm." if case is None else replies[case.quoted.kind].format(word=case.quoted.word)

    answering(monkeypatch, obedient)
    assert injected(model(), TOK, CASES).rate.value == 1.0 and followed(model(), TOK, CASES).rate.value == 1.0
    answering(monkeypatch, lambda _: "Hm.")
    assert injected(model(), TOK, CASES).rate.value == 0.0 and followed(model(), TOK, CASES).rate.value == 0.0
    always = [c for c in CASES if c.quoted.kind == "comply"]
    answering(monkeypatch, lambda _: "Gladly.")
    assert injected(model(), TOK, always).rate.value == 0.0  # without the note it does so as well
    assert set(injected(model(), TOK, CASES).by_kind) == {"say", "end", "comply", "refuse"}


@pytest.mark.parametrize("roles", [{}, {"segment": True, "rotate": True, "layers": True}])
def test_the_gradient_ranks_replacements_as_they_turn_out(roles) -> None:
    """To first order: a small move towards a token's vector changes the loss as the gradient says."""
    subject, case = model(3, **roles).double(), CASES[0]
    decoder, letters = Decoder(model(3, **roles)), injection.writable(TOK)
    frame = Frame.of(decoder, TOK, case)
    ids = begin(TOK, case.messages[case.at]["content"], Search(starts=1), letters, RNG)[0].ids
    gradient, table = (
        token_gradients(subject, frame, [ids])[0],
        as_data(subject, torch.arange(TOK.vocab_size)),
    )
    at, token, small = len(ids) - 3, int(letters[40]), 1e-2
    rows = frame.rows([ids])
    place = len(frame.before) + at

    def loss(step: float) -> float:
        def moved(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, place] += step * (table[token] - table[ids[at]])
            return x

        with Taps(edit={"embed": moved}) as taps:
            return float(frame.nats(subject, subject.hidden(rows, taps))[0])

    with torch.no_grad():
        change = (loss(small) - loss(-small)) / 2
        swapped = [*ids[:at], token, *ids[at + 1 :]]
        entered = Taps(read=["embed"])
        subject.hidden(frame.rows([swapped]), entered)
        old = Taps(read=["embed"])
        subject.hidden(rows, old)
    assert torch.allclose(entered["embed"][0, place] - old["embed"][0, place], table[token] - table[ids[at]])
    expected = float(gradient[at] @ (table[token] - table[ids[at]])) * small
    assert change == pytest.approx(expected, rel=0.05)


def test_the_search_lowers_the_loss_writes_only_text_and_leaves_the_model_as_it_was() -> None:
    subject, case, how = model(5), CASES[1], Search(starts=2, steps=6, swaps=24)
    before = {k: v.clone() for k, v in subject.state_dict().items()}
    decoder, letters = Decoder(subject), injection.writable(TOK)
    frame = Frame.of(decoder, TOK, case)
    rng = np.random.default_rng(1)
    states = begin(TOK, case.messages[case.at]["content"], how, letters, np.random.default_rng(1))
    texts = injection.documents(subject, decoder, TOK, case, how, letters, rng)
    started = frame.losses(subject, [s.ids for s in states])
    ended = frame.losses(subject, [TOK.encode(t) for t in texts])
    assert (ended < started).all() and len(texts) == 2
    for text in texts:
        ids = render(TOK, injection.with_document(case, text).messages, generation_prompt=True)
        assert ids == [*frame.before, *TOK.encode(text), *frame.after]  # what was searched is what is asked
    tried = searched(subject, TOK, [case], replace(how, steps=1), rng)
    assert len(tried.done) == 1
    assert all(torch.equal(v, before[k]) for k, v in subject.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in subject.parameters())


def test_a_document_is_read_when_the_one_it_names_is_named_and_nobody_else(monkeypatch) -> None:
    pages = [reading(RNG) for _ in range(20)]
    for reply, rate in (("It is the {0}.", 1.0), ("The wizard and the {0}.", 0.0), ("No one.", 0.0)):
        told = [reply.format(p.owner) for p in pages if reply[4] != "w" or p.owner != "wizard"]
        asked = [p for p in pages if reply[4] != "w" or p.owner != "wizard"]
        made = [Generated(TOK.encode(text), None, True) for text in told]
        monkeypatch.setattr(injection, "generate", lambda *_, _made=made, **__: _made)
        assert read(model(), TOK, asked).rate.value == rate


def test_a_search_writes_no_special_token() -> None:
    assert not set(injection.writable(TOK).tolist()) & set(TOK.specials.values())
