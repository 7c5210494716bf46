"""A model on this machine as an engine: batched writing from a cache, and log-probabilities of options.

The model itself and another local checkpoint are the same kind of thing here: what differs is whose weights
the digest names. Prompts are put in the model's own chat format (`evals.chat`), several turns included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from glasshouse.align.engines import Chat, seeds_for
from glasshouse.base.errors import UsageError
from glasshouse.evals.chat import ChatFormat, chat_format
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest
from glasshouse.model.generate import Decoder, generate, score
from glasshouse.tokenizer import Tokenizer, render

# What ends an assistant's turn before the next user's, by chat format: (special token, text).
_TURN_END = {"chatml": ("<|im_end|>", "\n"), "llama3": ("<|eot_id|>", ""), "plain": ("", "\n")}
# What begins a conversation once, and not every turn of it.
_ONCE = {"chatml": 0, "llama3": 1, "plain": 0}


class LocalEngine:
    """A model that writes and chooses as its weights are now: make a new engine after training on.

    ``dtype``: precision of the products, None for the weights' own.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        chat: ChatFormat | None = None,
        *,
        name: str = "local model",
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chat = chat or chat_format(tokenizer)
        self.name, self.batch_size, self._dtype = name, batch_size, dtype

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights, when first asked for."""
        return weights_digest(self.model)

    @cached_property
    def decoder(self) -> Decoder:
        """The weights laid out for writing, once."""
        return Decoder(self.model, dtype=self._dtype)

    def ids(self, prompt: Chat) -> list[int]:
        """Tokens up to where a conversation's next answer begins. `UsageError` unless a user spoke last."""
        if not prompt or prompt[-1]["role"] != "user":
            raise UsageError("an engine answers a user: the conversation must end with a user's message")
        if self.chat.name == "glasshouse":
            return render(self.tokenizer, prompt, generation_prompt=True)
        return self._foreign(prompt)

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Answers as text; each depends on its own prompt and seed alone. `UsageError` for one too long."""
        rows = [self.ids(p) for p in prompts]
        self._room(rows, max_new_tokens)
        made = generate(
            self.decoder,
            rows,
            max_new_tokens,
            stop=self.chat.stop,
            temperature=temperature,
            seeds=seeds_for(prompts, seed) if temperature > 0 else None,
            batch_size=self.batch_size,
            vocab=self.tokenizer.vocab_size,
        )
        return [self.tokenizer.decode(g.ids).strip() for g in made]

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities [prompt][option] of the options' tokens as the answer's first ones."""
        spelt = [self.tokenizer.encode(f" {o}" if self.chat.spaced else o) for o in options]
        if len({tuple(s) for s in spelt}) < len(options) or not all(spelt):
            raise UsageError(f"the options {list(options)} are empty or the same to this tokenizer")
        rows = [self.ids(p) for p in prompts]
        self._room(rows, max(map(len, spelt)))
        if max(map(len, spelt)) > 1:
            return self._scored(rows, spelt)
        found = self._first(rows)
        return [[float(logp[s[0]]) for s in spelt] for logp in found]

    @torch.inference_mode()
    def _first(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Log-probabilities [vocab] of every prompt's next token, prompts of like length together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        done: dict[int, torch.Tensor] = {}
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            cache = self.decoder.cache(len(some), len(rows[some[0]]))
            logits = self.decoder.logits(self.decoder.prefill([rows[i] for i in some], cache)).float()
            done.update(zip(some, logits.log_softmax(-1), strict=True))
        return [done[i] for i in range(len(rows))]

    def _scored(self, rows: list[list[int]], spelt: list[list[int]]) -> list[list[float]]:
        """The same for options of several tokens: the sum over each option's tokens."""
        asked = [[*row, *s] for row in rows for s in spelt]
        found = iter(score(self.model, asked, batch_size=self.batch_size))
        return [[sum(next(found).logprobs[-len(s) :]) for s in spelt] for _ in rows]

    def _room(self, rows: Sequence[Sequence[int]], new: int) -> None:
        context = self.model.config.context
        longest = max(rows, key=len, default=[])
        if len(longest) + new > context:
            raise UsageError(
                f"a prompt of {len(longest)} tokens and {new} of an answer do not fit {self.name}'s context "
                f"of {context}: {self.tokenizer.decode(longest[:30])!r}...; use fewer worked examples or "
                "shorter wordings, or a model with a longer context"
            )

    def _foreign(self, prompt: Chat) -> list[int]:
        """Several turns in a foreign chat format, as its family's published template writes them."""
        tok, chat = self.tokenizer, self.chat
        special, text = _TURN_END[chat.name]
        end = [*([tok.specials[special]] if special else []), *tok.encode(text)]
        out: list[int] = []
        for k, message in enumerate(prompt):
            match message["role"]:
                case "user":
                    out += [*chat.before[_ONCE[chat.name] if out else 0 :], *tok.encode(message["content"])]
                    out += chat.after
                case "assistant" if k and prompt[k - 1]["role"] == "user":
                    out += [
                        *tok.encode(f" {message['content']}" if chat.spaced else message["content"]),
                        *end,
                    ]
                case "assistant":
                    raise UsageError("an answer in a conversation must follow a user's message")
                case role:
                    raise UsageError(
                        f"the chat format {chat.name!r} is asked without {role} messages; put the text into "
                        "the user's message"
                    )
        return out
