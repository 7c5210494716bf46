"""The model under examination: asked in batches, read at the answer's first token, every pass counted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.data import workshop
from glasshouse.model import GPT, Taps
from glasshouse.model.generate import Decoder, generate
from glasshouse.model.taps import Edit
from glasshouse.tokenizer import Tokenizer, render
from glasshouse.train.objective import autocast

ROWS = 64  # prompts in one forward pass; on small models larger batches fall out of cache


@dataclass(frozen=True)
class Readout:
    """A decision read from next-token logits: ``positive`` openers against ``negative`` openers.

    For refusal, positive are the tokens an answer that refuses begins with.
    """

    name: str
    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def margin(self, logits: Tensor) -> Tensor:
        """log P(positive opener) - log P(negative opener) [...] of logits [..., vocab]; above 0: refuses."""
        chosen = logits.float()
        return chosen[..., list(self.positive)].logsumexp(-1) - chosen[..., list(self.negative)].logsumexp(-1)


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


class Subject:
    """A model with its tokenizer and read-out. ``passes`` counts sequences run forward, for cost accounts.

    ``dtype`` ("fp32" or "bf16") is that of the matrix products it is asked in; weights stay as they are.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        readout: Readout,
        strays: Sequence[str] = (),
        dtype: str = "fp32",
    ):
        self.model, self.tokenizer, self.readout, self.strays = model, tokenizer, readout, tuple(strays)
        self.passes, self.dtype = 0, dtype

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
        return render(self.tokenizer, [{"role": "user", "content": text}], generation_prompt=True)

    def margins(self, prompts: Sequence[str], edit: Mapping[str, Edit] | None = None) -> np.ndarray:
        """Read-out margin [n] at the first answer token of each prompt's text; above 0 the model refuses."""
        return self.margins_of_ids([self.ids(p) for p in prompts], edit)

    @torch.no_grad()
    def margins_of_ids(
        self, rows: Sequence[Sequence[int]], edit: Mapping[str, Edit] | None = None
    ) -> np.ndarray:
        """The same for token ids. Rows are padded on the right, which a causal model never sees.

        VerificationError when a margin is not finite: NaN is below no limit, so it would count as a refusal.
        """
        out = np.empty(len(rows), dtype=np.float32)
        for chosen, tokens, last in padded_batches(rows):
            with self.precision(), Taps(edit=edit) if edit else contextlib.nullcontext() as taps:
                hidden = self.model.hidden(tokens, taps)
                logits = self.model.unembed(hidden[torch.arange(len(chosen)), last])
            out[chosen] = self.readout.margin(logits).numpy()
        self.passes += len(rows)
        return finite(out)

    @torch.no_grad()
    def residuals(self, prompts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations [n, d_model] of each residual site at the position where the answer begins."""
        rows = [self.ids(p) for p in prompts]
        out = {site: torch.empty(len(rows), self.model.config.d_model) for site in sites}
        for chosen, tokens, last in padded_batches(rows):
            with self.precision(), Taps(read=sites, stop_early=True) as taps:
                self.model.hidden(tokens, taps)
            for site in sites:
                out[site][torch.as_tensor(chosen)] = taps[site][torch.arange(len(chosen)), last].float()
        self.passes += len(rows)
        return out

    def answers(self, prompts: Sequence[str], max_new_tokens: int = 40) -> list[str]:
        """Greedy answers as text, what a person would read."""
        if self.tokenizer.end is None:
            raise UsageError("this tokenizer has no chat tokens; answers cannot be asked for")
        made: list[str] = []
        rows = [self.ids(p) for p in prompts]
        decoder = Decoder(self.model, dtype=None if self.dtype == "fp32" else torch.bfloat16)
        for start in range(0, len(rows), ROWS):
            part = generate(decoder, rows[start : start + ROWS], max_new_tokens, stop={self.tokenizer.end})
            made += [self.tokenizer.decode(g.ids).strip() for g in part]
            self.passes += len(part)
        return made


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
        width = max(len(rows[i]) for i in chosen)
        tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
        for at, i in enumerate(chosen):
            tokens[at, : len(rows[i])] = torch.as_tensor(rows[i], dtype=torch.int64)
        batches.append((chosen, tokens, torch.tensor([len(rows[i]) - 1 for i in chosen])))
    return batches
