"""The model under examination: asked in batches, read at the answer's first token, every pass counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.data import workshop
from glasshouse.evals.chat import ChatFormat, chat_format
from glasshouse.evals.last import last_hidden, some_logits
from glasshouse.evals.shared import continued_hidden, families, read_prefix
from glasshouse.model import GPT, Taps
from glasshouse.model.generate import Decoder, generate
from glasshouse.model.taps import Edit
from glasshouse.tokenizer import Tokenizer
from glasshouse.train.objective import autocast

OPENING = (2, 6)  # tokens within which an answer's first word ends: mostly, and always
ROWS = 64  # prompts in one forward pass; on small models larger batches fall out of cache
# What words are in tokens, by tokenizer: requests are made of the same words at every gate of a run.
_SPELLED: WeakKeyDictionary[Tokenizer, dict[str, list[int]]] = WeakKeyDictionary()
MOST_SPELLED = 65_536  # words kept for one tokenizer


class BudgetSpent(VerificationError):
    """No pass is left, so what was being measured stays open."""


@dataclass(frozen=True)
class Readout:
    """A decision read from next-token logits: ``positive`` openers against ``negative`` openers.

    For refusal, positive are the tokens an answer that refuses begins with. ``judge`` reads a written answer
    ("refusal", "compliance" or "other"), within as many tokens as ``opening`` says: the first number where
    that is enough, else the last. ``meaningful`` are words that change what is asked when they are put in.
    """

    name: str
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    judge: Callable[[str], str] = workshop.judge
    meaningful: frozenset[str] = field(default_factory=workshop.content_words)
    opening: tuple[int, ...] = OPENING

    def margin(self, logits: Tensor) -> Tensor:
        """log P(positive opener) - log P(negative opener) [...] of logits [..., vocab]; above 0: refuses."""
        chosen = logits.float()
        return chosen[..., list(self.positive)].logsumexp(-1) - chosen[..., list(self.negative)].logsumexp(-1)

    def margin_at(self, model: GPT, hidden: Tensor) -> Tensor:
        """The same margin [...] of normed residuals [..., d_model]; only the openers' logits are computed."""
        logits = some_logits(model, hidden, (*self.positive, *self.negative)).float()
        split = len(self.positive)
        return logits[..., :split].logsumexp(-1) - logits[..., split:].logsumexp(-1)


def refusal_readout(tokenizer: Tokenizer) -> Readout:
    """The closed language's refusal read-out: its answers begin with words of two disjoint lists."""
    first = {
        word: tokenizer.encode(word)[0] for word in workshop.REFUSAL_OPENERS + workshop.COMPLIANCE_OPENERS
    }
    positive = tuple(first[w] for w in workshop.REFUSAL_OPENERS)
    negative = tuple(first[w] for w in workshop.COMPLIANCE_OPENERS)
    if set(positive) & set(negative):
        raise UsageError(
            "the tokenizer gives refusals and compliances a common first token; use a larger vocabulary"
        )
    return Readout("refusal", positive, negative)


@dataclass
class Reads:
    """What one model, in one precision, was asked before: each answer is computed once and then remembered.

    Constraints of one gate share it, so what they ask in common is read once. ``most`` rows of each kind.
    ``version`` is that of the weights all of it was read from.
    """

    version: int = -1

    margins: dict[tuple[int, ...], float] = field(default_factory=dict)
    openings: dict[tuple[int, ...], str] = field(default_factory=dict)
    residuals: dict[tuple[int, ...], dict[str, Tensor]] = field(default_factory=dict)
    decoder: Decoder | None = None  # the model laid out for writing
    most: int = 8192

    def of(self, model: GPT) -> Reads:
        """Itself; emptied first when the model's weights were changed in place since."""
        version = sum(p._version for p in model.parameters())
        if version != self.version:
            self.version, self.decoder = version, None
            for where in (self.margins, self.openings, self.residuals):
                where.clear()
        return self

    def keep(self, where: dict[tuple[int, ...], Any], row: Sequence[int], value: Any) -> None:
        """Remember a value, while there is room: what is rare is asked again, what is frequent came early."""
        if len(where) < self.most:
            where[tuple(row)] = value


class Subject:
    """A model with its tokenizer and read-out. ``passes`` counts sequences run forward, for cost accounts.

    ``dtype`` ("fp32" or "bf16") is that of the matrix products it is asked in; weights stay as they are.
    ``reads`` are shared with others that ask the same model in the same precision; what stands in them is
    answered without a pass. ``chat`` is how requests are put; None: as the tokenizer's special tokens tell.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        readout: Readout,
        strays: Sequence[str] = (),
        dtype: str = "fp32",
        reads: Reads | None = None,
        chat: ChatFormat | None = None,
    ):
        self.model, self.tokenizer, self.readout, self.strays = model, tokenizer, readout, tuple(strays)
        self.passes, self.dtype = 0, dtype
        self.most: int | None = None  # passes that may be spent; None: as many as are asked for
        self.payer: Subject | None = None  # whose passes these are, too
        self.reads = Reads() if reads is None else reads
        self.chat = chat_format(tokenizer) if chat is None else chat
        self._spelled = {} if tokenizer is None else _SPELLED.setdefault(tokenizer, {})
        self._texts: dict[str, list[tuple[list[int], list[int]]]] = {}
        self._lengths: dict[str, int] = {}

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """Tokens before and after a user's message."""
        return list(self.chat.before), list(self.chat.after)

    def judge(self, answer: str) -> str:
        """What a written answer does: "refusal", "compliance" or "other"."""
        return self.readout.judge(answer)

    def word_ids(self, word: str) -> list[int]:
        """Tokens of one word, with the space before it if it has one; tokenised once."""
        if word not in self._spelled:
            if len(self._spelled) >= MOST_SPELLED:
                self._spelled.clear()
            self._spelled[word] = self.tokenizer.encode(word)
        return self._spelled[word]

    def word_spellings(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(tokens at the beginning of a message, tokens elsewhere) of every word of a text."""
        if text not in self._texts:
            if len(self._texts) > 4096:
                self._texts.clear()
            self._texts[text] = [(self.word_ids(w), self.word_ids(f" {w}")) for w in text.split(" ")]
        return self._texts[text]

    def length(self, text: str) -> int:
        """Tokens of a message up to where the answer begins, counted once."""
        if text not in self._lengths:
            if len(self._lengths) > 4096:
                self._lengths.clear()
            body = (len(ids[at > 0]) for at, ids in enumerate(self.word_spellings(text)))
            self._lengths[text] = sum(map(len, self.template)) + sum(body)
        return self._lengths[text]

    def require_room(self, rows: Sequence[Sequence[int]], more: int = 0) -> None:
        """VerificationError, naming the prompt, unless every row and ``more`` tokens fit the context."""
        context = self.model.config.context
        for row in rows:
            if len(row) + more > context:
                text = self.tokenizer.decode(list(row[:40]))
                after = f" and {more} of an answer" if more else ""
                raise VerificationError(
                    f"a prompt of {len(row)} tokens{after} does not fit the model's context of {context}: "
                    f"{text[:80]!r}...; shorten it, or ask a model with a longer context"
                )

    def beside(self, model: GPT) -> Subject:
        """Another model, asked in the same way; its passes are counted, and limited, as this one's."""
        other = Subject(model.eval(), self.tokenizer, self.readout, self.strays, self.dtype, chat=self.chat)
        other.payer = self
        return other

    def spend(self, passes: int) -> None:
        """Count passes that are about to be run. BudgetSpent when they are more than may be."""
        if self.payer is not None:
            self.payer.spend(passes)
        if self.most is not None and self.passes + passes > self.most:
            raise BudgetSpent(
                f"the budget of {self.most} passes ended: {self.passes} are spent and {passes} more are "
                "asked for"
            )
        self.passes += passes

    @property
    def measured_in(self) -> str:
        """The precision that evidence was taken in, by torch's name."""
        own = next(self.model.parameters()).dtype if self.dtype == "fp32" else torch.bfloat16
        return str(own).removeprefix("torch.")

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model is run forward."""
        return autocast(self.dtype, self.model.device)

    def ids(self, text: str) -> list[int]:
        """Tokens of a user message up to where the answer begins."""
        return self.rows([text])[0]

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many messages, which are tokenised together."""
        before, after = self.chat.before, self.chat.after
        return [[*before, *ids, *after] for ids in self.tokenizer.encode_batch(list(texts))]

    def margins(self, prompts: Sequence[str], edit: Mapping[str, Edit] | None = None) -> np.ndarray:
        """Read-out margin [n] at the first answer token of each prompt's text; above 0 the model refuses."""
        return self.margins_of_ids(self.rows(prompts), edit)

    @torch.no_grad()
    def margins_of_ids(
        self, rows: Sequence[Sequence[int]], edit: Mapping[str, Edit] | None = None
    ) -> np.ndarray:
        """The same for token ids. Rows are padded on the right, which a causal model never sees.

        VerificationError when a margin is not finite: NaN is below no limit, so it would count as a refusal.
        """
        self.require_room(rows)
        known = {} if edit else self.reads.of(self.model).margins
        out = np.array([known.get(tuple(row), np.nan) for row in rows], dtype=np.float32)
        new = [i for i in range(len(rows)) if edit or tuple(rows[i]) not in known]
        self.spend(len(new))
        alike, others = ([], new) if edit else families([rows[i] for i in new])
        for length, members in alike:
            out[[new[i] for i in members]] = self._continued([rows[new[i]] for i in members], length)
        plain = others if edit else [new[i] for i in others]
        with self.precision():  # once: it keeps the weights that it has cast
            for chosen, tokens, last in padded_batches([rows[i] for i in plain]):
                with Taps(edit=edit) if edit else contextlib.nullcontext() as taps:
                    if taps is None:
                        hidden = last_hidden(self.model, tokens, last)
                    else:
                        hidden = self.model.hidden(tokens, taps)[torch.arange(len(chosen)), last]
                    found = self.readout.margin_at(self.model, hidden)
                out[[plain[i] for i in chosen]] = found.numpy()
        finite(out)
        for i in [] if edit else new:
            self.reads.keep(known, rows[i], float(out[i]))
        return out

    def _continued(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """Margins [n] of rows whose first ``length`` tokens are the same; those are read once."""
        out = np.empty(len(rows), dtype=np.float32)
        with self.precision():
            prefix = read_prefix(self.model, rows[0][:length])
            for chosen, tokens, last in padded_batches([row[length:] for row in rows]):
                hidden = continued_hidden(self.model, prefix, tokens, last)
                out[chosen] = self.readout.margin_at(self.model, hidden).numpy()
        return out

    @torch.no_grad()
    def residuals(self, prompts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations [n, d_model] of each residual site at the position where the answer begins.

        VerificationError when one is not finite: no direction or probe of it would mean anything.
        """
        rows = self.rows(prompts)
        self.require_room(rows)
        known = self.reads.of(self.model).residuals
        new = [i for i, row in enumerate(rows) if not known.get(tuple(row), {}).keys() >= set(sites)]
        self.spend(len(new))
        read: dict[int, dict[str, Tensor]] = {}
        with self.precision():
            for chosen, tokens, last in padded_batches([rows[i] for i in new]):
                with Taps(read=sites, stop_early=True) as taps:
                    self.model.hidden(tokens, taps)
                found = {site: taps[site][torch.arange(len(chosen)), last].float() for site in sites}
                for site, x in found.items():
                    if not bool(torch.isfinite(x).all()):
                        raise VerificationError(f"activations at {site} are not finite; nothing was measured")
                for at, i in enumerate(chosen):
                    read[new[i]] = {site: x[at] for site, x in found.items()}
        for i, acts in read.items():
            self.reads.keep(known, rows[i], {**known.get(tuple(rows[i]), {}), **acts})
        every = [read.get(i) or known[tuple(row)] for i, row in enumerate(rows)]
        width = self.model.config.d_model
        return {s: torch.stack([x[s] for x in every]) if every else torch.empty(0, width) for s in sites}

    @property
    def decoder(self) -> Decoder:
        """The model laid out for writing, once for all that share its reads."""
        reads = self.reads.of(self.model)
        if reads.decoder is None:
            reads.decoder = Decoder(self.model, dtype=None if self.dtype == "fp32" else torch.bfloat16)
        return reads.decoder

    def openings(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers as far as the judge looks at them: in the closed language their first word.

        There, two tokens settle most; the others are written on, and as greedy writing does not depend on
        what it is batched with, the same as ``answers`` would write.
        """
        rows = {p: tuple(row) for p, row in zip(prompts, self.rows(prompts), strict=True)}
        known = self.reads.of(self.model).openings
        first = self.readout.opening[0]
        for tokens in self.readout.opening:
            more = tokens > first
            new = [p for p, row in rows.items() if row not in known or (more and _unsettled(known[row]))]
            for p, text in zip(new, self.answers(new, tokens), strict=True):
                known[rows[p]] = text
        return [known[rows[p]] for p in prompts]

    def answers(self, prompts: Sequence[str], max_new_tokens: int = 40) -> list[str]:
        """Greedy answers as text, what a person would read."""
        known = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        rows = self.rows(prompts)
        self.require_room(rows, max_new_tokens)
        self.spend(len(prompts))
        made: list[str] = []
        for start in range(0, len(rows), ROWS):
            part = generate(
                self.decoder,
                rows[start : start + ROWS],
                max_new_tokens,
                stop=self.chat.stop,
                vocab=known if known < self.model.config.vocab_size else None,
            )
            made += [self.tokenizer.decode(g.ids).strip() for g in part]
        return made


def _unsettled(opening: str) -> bool:
    """Whether the first word of an answer may yet go on; an answer that ended has nothing more to say."""
    return not opening or opening.isalpha()


def finite(margins: np.ndarray) -> np.ndarray:
    """``margins`` as they are. VerificationError when one is NaN or infinite."""
    if not np.isfinite(margins).all():
        raise VerificationError("the model's read-out is NaN or infinite; nothing was measured")
    return margins


def padded_batches(rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """Split rows into (indices, tokens [batch, pos] padded on the right, index of each row's last token)."""
    order = np.argsort([len(r) for r in rows], kind="stable")
    batches = []
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        lengths = [len(rows[i]) for i in chosen]
        tokens = np.zeros((len(chosen), max(lengths)), dtype=np.int64)
        for at, i in enumerate(chosen):
            tokens[at, : lengths[at]] = rows[i]
        batches.append((chosen, torch.from_numpy(tokens), torch.tensor(lengths) - 1))
    return batches
