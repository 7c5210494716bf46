"""A model on this machine chooses with the probabilities it has, in the chat format it knows."""

from __future__ import annotations

import pytest
import torch

from align.judges import TOK, asked, judge, letters
from evals.test_chat import foreign
from glasshouse.align.local import LocalEngine
from glasshouse.base.errors import UsageError
from glasshouse.evals.chat import chat_format
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest

PROMPTS = [asked("A or B?"), asked("Please tell me, at some length: A or B, the letter alone?"), asked("Hm")]
TALK = [*asked("Hello"), {"role": "assistant", "content": "Good day."}, *asked("A or B?")]


def test_log_probabilities_are_those_of_the_full_forward_pass() -> None:
    engine = judge()
    found = engine.choose([*PROMPTS, TALK], ["A", "B"])  # type: ignore[list-item]
    for prompt, logprobs in zip([*PROMPTS, TALK], found, strict=True):
        with torch.no_grad():
            logits = engine.model(torch.tensor([engine.ids(prompt)]))[0, -1]  # type: ignore[arg-type]
        expected = [float(logits.log_softmax(-1)[TOK.encode(o)[0]]) for o in "AB"]
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_an_option_of_several_tokens_is_as_likely_as_all_of_them() -> None:
    engine = judge()
    option = "A and then B"
    ids = TOK.encode(option)
    assert len(ids) > 1
    found = engine.choose(PROMPTS, [option, "B"])  # type: ignore[arg-type]
    for prompt, logprobs in zip(PROMPTS, found, strict=True):
        row = engine.ids(prompt)  # type: ignore[arg-type]
        with torch.no_grad():
            logp = engine.model(torch.tensor([[*row, *ids]]))[0].log_softmax(-1)
        expected = sum(float(logp[len(row) - 1 + k, t]) for k, t in enumerate(ids))
        assert logprobs[0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UsageError, match="the same"):
        engine.choose(PROMPTS, ["A", "A"])  # type: ignore[arg-type]


def test_what_a_prompt_gets_does_not_depend_on_what_else_is_asked() -> None:
    engine = judge()
    together = engine.write(PROMPTS, 8, 1.0, seed=7)  # type: ignore[arg-type]
    alone = [engine.write([p], 8, 1.0, seed=7)[0] for p in PROMPTS]  # type: ignore[list-item]
    assert together == alone and len(set(together)) == 3
    assert engine.write(PROMPTS, 8, 1.0, seed=8) != together  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="2 seeds for 3 prompts"):
        engine.write(PROMPTS, 8, 1.0, [1, 2])  # type: ignore[arg-type]


def test_the_digest_is_that_of_the_weights() -> None:
    assert judge().digest == weights_digest(letters()) != judge(lean=3.0).digest


# What the families' published templates make of this conversation (model cards of Qwen2.5 and Llama 3).
PUBLISHED = {
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n"
    "<|im_start|>user\nA or B?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nGood day.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nA or B?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "plain": "Question: Hello\nAnswer: Good day.\nQuestion: A or B?\nAnswer:",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_several_turns_are_put_as_each_family_published(name: str) -> None:
    tok = foreign(name)
    made = GPT(letters().config.model_copy(update={"vocab_size": tok.vocab_size}))
    engine = LocalEngine(made, tok, chat_format(tok))
    assert tok.decode(engine.ids(TALK), specials=True) == PUBLISHED[name]  # type: ignore[arg-type]
    for wrong in ([{"role": "system", "content": "x"}, *asked("Hm")], TALK[1:], TALK[:2], []):
        with pytest.raises(UsageError):
            engine.ids(wrong)  # type: ignore[arg-type]
