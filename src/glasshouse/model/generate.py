"""Continue prompts: cached, batched, ragged, greedy or sampled with a seed for each sequence.

The work is done by `Decoder` (decode.py), the model laid out for small steps; give one in place of a model to
lay it out once for many calls, in bf16 or with weights in 8 bits. What a sequence gets depends on its own
prompt, seed and settings, never on its batch mates: to the bit on CPUs in fp32 and bf16, see decode.py.

Shape legend: B prompts in a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.base.rng import generator
from glasshouse.model.cache import SlotCache
from glasshouse.model.decode import CHUNK, Decoder
from glasshouse.model.gpt import GPT
from glasshouse.model.sampling import Sampling, likeliest
from glasshouse.model.stops import Decode, StopText
from glasshouse.model.taps import Edit, Taps

__all__ = [
    *("Decoder", "Generated", "Piece", "Prefix", "Sampling", "Scored"),
    *("generate", "last_logits", "prefix", "score", "stream"),
]


@dataclass(frozen=True)
class Generated:
    """One continuation. The prompt, the stop token and the stop string are not part of it.

    ``logprobs``: nats per id under the model itself, before temperature and filters; None unless asked
    for. ``stopped``: a stop token or string ended it, and not the limit; ``stopped_by`` says which.
    ``text``: the ids as text, None without ``decode``. A token that holds the beginning of a stop string
    after other characters is left out of ``ids``, while ``text`` has the characters. ``top``: for each id the
    likeliest tokens as (id, log-probability); None unless asked for. ``stop_logprob``: of the stop token
    that ended it, where ``logprobs`` were asked for.
    """

    ids: list[int]
    logprobs: list[float] | None
    stopped: bool
    text: str | None = None
    stopped_by: int | str | None = None
    top: list[list[tuple[int, float]]] | None = None
    stop_logprob: float | None = None


@dataclass(frozen=True)
class Prefix:
    """A text that many prompts begin with, read once. Made by `prefix`; use it with ``generate``."""

    ids: tuple[int, ...]
    decoder: Decoder
    cache: SlotCache


@dataclass(frozen=True)
class Piece:
    """One streamed token. ``text`` is what became certain with it: it may lag behind or be empty."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a given sequence's tokens from the second on, in nats, each after those before it.

    ``greedy``: whether the token was the likeliest. ``top``: as in ``Generated``; None unless asked for.
    """

    logprobs: list[float]
    greedy: list[bool]
    top: list[list[tuple[int, float]]] | None = None


@torch.inference_mode()
def generate(
    model: GPT | Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    stop_text: Sequence[str] = (),
    decode: Decode | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seeds: Sequence[int] | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    batch_size: int = 64,
    prefix: Prefix | None = None,
    vocab: int | None = None,
) -> list[Generated]:
    """Continue each prompt (token ids) by up to ``max_new_tokens``; results in the order of the prompts.

    ``seeds``: one int per prompt, needed when temperature > 0. What a sequence draws depends on its
    own seed and never on its batch mates. ``stop_text`` ends a continuation where the text of its ids, by
    ``decode``, first holds one of the strings. ``prefix`` stands before every prompt. What all prompts of a
    call begin with is read once in any case. ``vocab``: the tokenizer's size; ids beyond it are never drawn.

    Raises UsageError for an empty prompt, an id outside the vocabulary, a prompt that with its new tokens
    exceeds the context, and settings without sense; CheckpointError when the model's logits are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    full = [[*(prefix.ids if prefix else ()), *p] for p in prompts]
    config = model.config
    _check(config.vocab_size, config.context, full, max_new_tokens)
    _check_vocab(vocab, config.vocab_size)
    if temperature > 0 and seeds is None:
        raise UsageError("sampling needs seeds: one int per prompt, so that the text can be drawn again")
    if seeds is not None and len(seeds) != len(prompts):
        raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    if top_logprobs < 0:
        raise UsageError(f"top_logprobs must not be negative, got {top_logprobs}")
    asked = _Asked(
        sampling, frozenset(stop), StopText(stop_text, decode), return_logprobs, top_logprobs, vocab
    )
    if not prompts or not max_new_tokens:
        return [asked.result([], [], [], None) for _ in prompts]
    decoder = _decoder(model, prefix)
    shared = prefix or _common(decoder, full)
    # Neighbours in length share a batch, so that little of it is padding; the longest come first.
    order = sorted(range(len(full)), key=lambda i: len(full[i]), reverse=True)
    done: dict[int, Generated] = {}
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        uniforms = None
        if temperature > 0 and seeds is not None:
            uniforms = np.stack([_uniforms(seeds[i], max_new_tokens) for i in rows])
        made = _run(decoder, [full[i] for i in rows], max_new_tokens, asked, uniforms, shared)
        done.update(zip(rows, made, strict=True))
    return [done[i] for i in range(len(full))]


def prefix(model: GPT | Decoder, ids: Sequence[int]) -> Prefix:
    """Read ``ids`` once, to stand before the prompts of later ``generate`` calls. Raises as ``generate``."""
    _check(model.config.vocab_size, model.config.context, [ids], 0)
    decoder = _decoder(model, None)
    cache = decoder.cache(1, len(ids))
    decoder.prefill([ids], cache)
    return Prefix(tuple(ids), decoder, cache)


@torch.inference_mode()
def stream(
    model: GPT | Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    stop_text: Sequence[str] = (),
    decode: Decode | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    prefix: Prefix | None = None,
    vocab: int | None = None,
) -> Iterator[Piece]:
    """Yield the tokens that ``generate`` returns for this prompt and seed, each as soon as it is known.

    The pieces' texts, joined, are ``Generated.text``: what may yet turn out to begin a stop string, or is an
    unfinished character, is held back. Ids that turn out to belong to a stop string have been yielded by
    then, without text. Raises as ``generate`` does, at the first piece.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    full = [*(prefix.ids if prefix else ()), *prompt]
    _check(model.config.vocab_size, model.config.context, [full], max_new_tokens)
    _check_vocab(vocab, model.config.vocab_size)
    if temperature > 0 and seed is None:
        raise UsageError("sampling needs a seed, so that the text can be drawn again")
    finder = StopText(stop_text, decode)
    asked = _Asked(sampling, frozenset(stop), finder, True, 0, vocab)
    if not max_new_tokens:
        return
    decoder = _decoder(model, prefix)
    uniforms = _uniforms(seed or 0, max_new_tokens) if temperature > 0 else None
    cache, x = _start(decoder, [full], max_new_tokens, prefix)
    ids: list[int] = []
    shown = 0
    for step in range(max_new_tokens):
        chosen, logp = asked.draw(decoder.logits(x), None if uniforms is None else uniforms[step : step + 1])
        token = int(chosen[0])
        if token in asked.stop:
            break
        ids.append(token)
        hit, text = finder.find(ids), finder.text(ids) or ""
        last = hit is not None or step + 1 == max_new_tokens
        text = hit[2] if hit is not None else text if last else finder.showable(text)
        yield Piece(token, text[shown:], float(logp[0, token]) if logp is not None else 0.0)
        shown = max(shown, len(text))
        if last:
            return
        x = decoder.step(chosen, cache)
    rest = (finder.text(ids) or "")[shown:]
    if rest:  # held back until the stop token came
        yield Piece(ids[-1], rest, 0.0)


@dataclass(frozen=True)
class _Asked:
    """What a call asks of every sequence."""

    sampling: Sampling
    stop: frozenset[int]
    finder: StopText
    logprobs: bool
    top: int
    vocab: int | None

    def draw(self, logits_BV: Tensor, uniforms_B: np.ndarray | None) -> tuple[Tensor, Tensor | None]:
        """Token ids [B], and log-probabilities [B, V] under the model itself where they are asked for."""
        logp = logits_BV.log_softmax(-1) if self.logprobs or self.top else None
        allowed = logits_BV if self.vocab is None else logits_BV[:, : self.vocab]
        return self.sampling.choose(allowed, uniforms_B), logp

    def result(
        self,
        ids: list[int],
        logprobs: list[float],
        top: list[list[tuple[int, float]]],
        stopped_by: int | str | None,
        text: str | None = None,
    ) -> Generated:
        n = len(ids)
        return Generated(
            ids,
            logprobs[:n] if self.logprobs else None,
            stopped_by is not None,
            text if text is not None else self.finder.text(ids),
            stopped_by,
            top[:n] if self.top else None,
        )


def _run(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limit: int,
    asked: _Asked,
    uniforms: np.ndarray | None,
    shared: Prefix | None,
) -> list[Generated]:
    """Decode prompts together, longest first."""
    n = len(prompts)
    cache, x = _start(decoder, prompts, limit, shared)
    ids: list[list[int]] = [[] for _ in range(n)]
    logprobs: list[list[float]] = [[] for _ in range(n)]
    top: list[list[list[tuple[int, float]]]] = [[] for _ in range(n)]
    done: dict[int, Generated] = {}
    active = list(range(n))  # which prompt each row of the cache is; finished ones stay a while
    for step in range(limit):
        chosen, logp = asked.draw(decoder.logits(x), None if uniforms is None else uniforms[active, step])
        tokens = chosen.tolist()
        picked = logp.gather(-1, chosen[:, None])[:, 0].tolist() if logp is not None else []
        best = likeliest(logp, asked.top) if logp is not None and asked.top else []
        for row, (i, token) in enumerate(zip(active, tokens, strict=True)):
            if i in done:
                continue
            if token in asked.stop:
                ended = asked.result(ids[i], logprobs[i], top[i], token)
                done[i] = replace(ended, stop_logprob=picked[row]) if asked.logprobs else ended
                continue
            ids[i].append(token)
            if picked:
                logprobs[i].append(picked[row])
            if best:
                top[i].append(best[row])
            if (hit := asked.finder.find(ids[i])) is not None:
                done[i] = asked.result(ids[i][: hit[1]], logprobs[i], top[i], hit[0], hit[2])
        if len(done) == n or step + 1 == limit:
            break
        going = [row for row, i in enumerate(active) if i not in done]
        if len(going) <= 3 * len(active) / 4:  # copying the cache for every row that ends costs more
            cache.keep(going)
            chosen, active = chosen[going], [active[row] for row in going]
        x = decoder.step(chosen, cache)
    return [done[i] if i in done else asked.result(ids[i], logprobs[i], top[i], None) for i in range(n)]


def _start(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new: int, shared: Prefix | None
) -> tuple[SlotCache, Tensor]:
    """A cache with the prompts in it, and the normed residuals [B, D] at their ends. A prompt that stands
    there several times, as in a group of answers to it, is read once.
    """
    places: dict[tuple[int, ...], int] = {}
    of = [places.setdefault(tuple(p), len(places)) for p in prompts]
    different = [list(p) for p in places]
    cache = decoder.cache(len(different), len(prompts[0]) + new)
    if shared is not None:
        # Whole chunks only, and never all of a prompt: its last position has yet to be computed.
        length = min(len(shared.ids), len(prompts[-1]) - 1) // CHUNK * CHUNK
        cache.put_prefix(shared.cache, length)
    x = decoder.prefill(different, cache)
    if len(different) < len(prompts):
        cache.keep(of)
        x = x[of]
    return cache, x


def _common(decoder: Decoder, prompts: Sequence[list[int]]) -> Prefix | None:
    """What all prompts begin with, read once, when it is long enough to pay."""
    if len(prompts) < 2:
        return None
    low, high = min(prompts), max(prompts)  # in the order of lists, so these two differ first
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    n = min(n, min(len(p) for p in prompts) - 1) // CHUNK * CHUNK
    return prefix(decoder, low[:n]) if n else None


def _decoder(model: GPT | Decoder, shared: Prefix | None) -> Decoder:
    if shared is not None:
        if model is not shared.decoder and model is not shared.decoder.model:
            raise UsageError("the prefix was read by another model; make it with the model that continues it")
        return shared.decoder
    return model if isinstance(model, Decoder) else Decoder(model)


def _uniforms(seed: int, n: int) -> np.ndarray:
    return generator("sample", int(seed)).random(n)


@torch.no_grad()
def score(
    model: GPT, sequences: Sequence[Sequence[int]], *, top: int = 0, batch_size: int = 64
) -> list[Scored]:
    """Log-probability of every token of given sequences but the first, as `Scored`, in their order.

    The full forward pass of the model itself, in its precision: what an "echo" request needs, or a
    likelihood of an answer. Raises as ``generate`` does, and UsageError for a model that sees later
    positions.
    """
    _check(model.config.vocab_size, model.config.context, sequences, 0)
    if not model.config.causal:
        raise UsageError(
            "this model sees later positions (causal=False): a token's score would know the token"
        )
    if batch_size < 1 or top < 0:
        raise UsageError(f"batch_size must be at least 1 and top at least 0, not {batch_size} and {top}")
    device, V = model.embed.weight.device, model.config.vocab_size
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    done: dict[int, Scored] = {}
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        lengths = [len(sequences[i]) for i in rows]
        padded = [[*sequences[i], *[0] * (lengths[-1] - len(sequences[i]))] for i in rows]
        tokens = torch.tensor(padded, dtype=torch.long, device=device)
        hidden = model.hidden(tokens)[:, :-1]
        for row, i in enumerate(rows):
            x, targets = hidden[row, : lengths[row] - 1], tokens[row, 1 : lengths[row]]
            logprobs: list[float] = []
            greedy: list[bool] = []
            best: list[list[tuple[int, float]]] = []
            for at in range(0, len(targets), max(1, 2**24 // V)):  # logits of at most 64 MB
                part = slice(at, at + max(1, 2**24 // V))
                logits = _finite(model.unembed(x[part]).float())
                logp = logits.log_softmax(-1)
                logprobs += logp.gather(-1, targets[part, None])[:, 0].tolist()
                greedy += (logits.argmax(-1) == targets[part]).tolist()
                best += likeliest(logp, top) if top else []
            done[i] = Scored(logprobs, greedy, best if top else None)
    return [done[i] for i in range(len(sequences))]


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
    _check(model.config.vocab_size, model.config.context, prompts, 0)
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


def _check_vocab(vocab: int | None, size: int) -> None:
    if vocab is not None and not 1 <= vocab <= size:
        raise UsageError(
            f"the tokenizer has {vocab} tokens and the model {size}: they do not belong together. "
            "Load the tokenizer that was saved with the model"
        )


def _check(vocab: int, context: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must not be negative, got {max_new_tokens}")
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
