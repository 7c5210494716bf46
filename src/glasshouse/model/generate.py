"""Continue prompts: cached, batched, ragged, greedy or sampled with a seed for each sequence.

Shape legend: B prompts in a batch, P longest prompt of the batch, S positions so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.base.rng import generator
from glasshouse.model.cache import KVCache
from glasshouse.model.gpt import GPT
from glasshouse.model.taps import Edit, Taps


@dataclass(frozen=True)
class Generated:
    """One continuation. The prompt and the stop token itself are not part of it.

    ``logprobs``: nats per id under the model itself, before temperature and filters; None unless asked
    for. ``stopped``: a stop token ended it, and not the limit.
    """

    ids: list[int]
    logprobs: list[float] | None
    stopped: bool


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 takes the likeliest (the lowest id on ties)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError("top_k and top_p have no effect at temperature 0; leave them out or sample")

    def choose(self, logits_BV: Tensor, uniforms_B: np.ndarray | None) -> Tensor:
        """Token ids int64 [B]; ``uniforms_B`` float64 in [0, 1), one per row (None when greedy).

        A row's token is where the cumulative probability passes its uniform, so it depends on the
        row's own logits and number alone. Different batch shapes round logits differently (about 1e-7
        relative in fp32), which moves a token only when a uniform falls into that gap.
        """
        if uniforms_B is None:
            return logits_BV.argmax(dim=-1)
        x = logits_BV.double() / self.temperature
        if self.top_k is not None and self.top_k < x.shape[-1]:
            kth = x.topk(self.top_k, dim=-1).values[:, -1:]
            x = x.masked_fill(x < kth, float("-inf"))
        p = x.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            # Nucleus (Holtzman et al. 2020): the smallest set whose mass reaches top_p.
            before = ordered.cumsum(dim=-1) - ordered
            p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        below = p.cumsum(dim=-1)
        target = torch.from_numpy(uniforms_B).to(p.device)[:, None] * below[:, -1:]
        return torch.searchsorted(below, target, right=True).squeeze(-1).clamp(max=x.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    return_logprobs: bool = False,
    batch_size: int = 64,
) -> list[Generated]:
    """Continue each prompt (token ids) by up to ``max_new_tokens``; results in the order of the prompts.

    ``seeds``: one int per prompt, needed when temperature > 0. What a sequence draws depends on its
    own seed and never on its batch mates. Raises UsageError for an empty prompt, an id outside the
    vocabulary, or a prompt that with its new tokens exceeds the context; CheckpointError when the
    model's logits are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, prompts, max_new_tokens)
    if temperature > 0 and seeds is None:
        raise UsageError("sampling needs seeds: one int per prompt, so that the text can be drawn again")
    if seeds is not None and len(seeds) != len(prompts):
        raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        uniforms = None
        if temperature > 0 and seeds is not None:
            uniforms = np.stack([generator("sample", int(seeds[i])).random(max_new_tokens) for i in rows])
        batch = _Batch(model, [prompts[i] for i in rows], max_new_tokens)
        made = batch.run(sampling, uniforms, frozenset(stop), return_logprobs)
        done.update(zip(rows, made, strict=True))
    return [done[i] for i in range(len(prompts))]


class _Batch:
    """Prompts decoded together; a row leaves as soon as it is finished."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int):
        self.model, self.limit, self.n = model, max_new_tokens, len(prompts)
        weight = model.embed.weight
        self.device = weight.device
        P = max(len(p) for p in prompts)
        padded = [[0] * (P - len(p)) + list(p) for p in prompts]  # on the left: all rows end together
        self.tokens = torch.tensor(padded, dtype=torch.long, device=self.device)  # [B, P]
        self.pad = torch.tensor([P - len(p) for p in prompts], device=self.device)  # [B]
        self.ragged = bool(self.pad.any())
        self.cache = KVCache(model.config, self.n, P + max_new_tokens, weight.dtype, self.device)

    def run(
        self, sampling: Sampling, uniforms: np.ndarray | None, stop: frozenset[int], return_logprobs: bool
    ) -> list[Generated]:
        ids: list[list[int]] = [[] for _ in range(self.n)]
        logprobs: list[list[float]] = [[] for _ in range(self.n)]
        stopped = [False] * self.n
        active = np.arange(self.n)  # which prompt each row of the batch is
        tokens = self.tokens
        for step in range(self.limit):
            logits = self._advance(tokens)  # [active, V]
            chosen = sampling.choose(logits, None if uniforms is None else uniforms[active, step])
            picked = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0] if return_logprobs else None
            going = []
            for row, (i, token) in enumerate(zip(active.tolist(), chosen.tolist(), strict=True)):
                if token in stop:
                    stopped[i] = True
                    continue
                ids[i].append(token)
                if picked is not None:
                    logprobs[i].append(float(picked[row]))
                going.append(row)
            if not going:
                break
            if len(going) < len(active):
                keep = torch.tensor(going, device=self.device)
                self.cache.keep(keep)
                self.pad, chosen, active = self.pad[keep], chosen[keep], active[going]
            tokens = chosen[:, None]
        return [
            Generated(ids[i], logprobs[i] if return_logprobs else None, stopped[i]) for i in range(self.n)
        ]

    def _advance(self, tokens: Tensor) -> Tensor:
        """fp32 logits [B, V] after new ``tokens`` [B, new]: the prompts at first, then one id per row."""
        positions, mask = None, None
        if self.ragged:
            past, new = self.cache.length, tokens.shape[1]
            at = torch.arange(past, past + new, device=self.device)
            positions = (at - self.pad[:, None]).clamp(min=0)  # [B, new]
            keys = torch.arange(past + new, device=self.device)
            real = keys >= self.pad[:, None]  # [B, S]
            # Padding sees itself and nothing else: an all-masked row would be a softmax over nothing, NaN.
            itself = at[:, None] == keys
            mask = ((at[:, None] >= keys) & real[:, None, :] | itself)[:, None]  # [B, 1, new, S]
        x = self.model.hidden(tokens, cache=self.cache, positions_BT=positions, mask=mask)
        return _finite(self.model.unembed(x[:, -1]).float())


@torch.no_grad()
def last_logits(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    edit: Mapping[str, Edit] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """fp32 logits [batch, vocab] of the token after each prompt, on the model's device.

    Prompts of equal length go together, so no padding is computed and the fused causal kernel serves.
    ``edit`` as in ``Taps``: each edit sees [rows, ...] of one length and may count positions from
    either end. Raises as ``generate`` does.
    """
    _check(model, prompts, 0)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    weight = model.embed.weight
    out = torch.empty(len(prompts), model.config.vocab_size, device=weight.device)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            tokens = torch.tensor([list(prompts[i]) for i in some], dtype=torch.long, device=weight.device)
            with Taps(edit=edit) as taps:
                x = model.hidden(tokens, taps if edit else None)[:, -1]
            out[some] = _finite(model.unembed(x).float())
    return out


def _finite(logits_BV: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits_BV).all()):
        raise CheckpointError(
            "the model's logits are not finite: its weights are damaged or overflow in this precision; "
            "load an earlier checkpoint or run it in fp32"
        )
    return logits_BV


def _check(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    vocab, context = model.config.vocab_size, model.config.context
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {i} is empty; begin it with at least one token (the <|bos|> token)")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise UsageError(f"prompt {i} holds token {bad}, outside the vocabulary of {vocab}")
        if len(prompt) + max_new_tokens > context:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's "
                f"context of {context}. Shorten it or ask for at most {max(0, context - len(prompt))}"
            )
