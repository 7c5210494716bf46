"""Batches as pure functions of (seed, step, plan): any step can be drawn alone, again, or elsewhere.

`NextTokenBatches` draws windows of text at random; `ChatBatches` deals whole conversations so that all are
seen equally often. In both a shard's weight is its share of the rows. Quarantine is a plan in which a weight
is 0 from some step on; nothing else has to be remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from glasshouse.base.batch import Batch
from glasshouse.base.errors import DataError
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.rng import generator
from glasshouse.data.shards import Shard, Shards
from glasshouse.tokenizer import Tokenizer, loss_mask

ROW_MULTIPLE = 8  # rows are padded to this: matrix kernels like it, and few distinct lengths occur


class NextTokenBatches:
    """Random windows of `context` tokens from text shards.

    Every row: a shard drawn with probability proportional to its weight, then a start drawn uniformly in it.
    A window may span documents; the target `<|bos|>` has weight 0, since nothing before it says that a
    document ends. Raises `DataError` if a shard is shorter than a window.
    """

    def __init__(self, shards: Shards, tok: Tokenizer, seed: int, batch_size: int, context: int) -> None:
        _check_sizes(shards, tok, batch_size, context)
        self.shards, self.seed, self.batch_size, self.context = shards, seed, batch_size, context
        self._token_bytes = tok.token_bytes

    def batch(self, step: int, plan: DataPlan) -> Batch:
        """Return the batch of `step` (from 0): tokens, targets and weight [batch_size, context]."""
        phase = plan.at(step)
        names = _active(self.shards, plan, phase, "text")
        share = np.array([phase.weights[name] for name in names], dtype=np.float64)
        rng = generator("next-token", self.seed, step)
        rows = []
        drawn = rng.choice(len(names), size=self.batch_size, p=share / share.sum())
        for k in drawn:
            shard = self._long_enough(names[k])
            rows.append((shard, int(rng.integers(shard.n_tokens - self.context))))
        return self._windows(rows)

    def validation(self, names: Sequence[str], n_batches: int) -> list[Batch]:
        """Return the same batches every time: windows spread evenly over the named shards.

        No two windows overlap; where the shards hold fewer than `n_batches` full batches, there are fewer.
        """
        places = [
            (self._long_enough(name), start)
            for name in names
            for start in range(0, self.shards[name].n_tokens - self.context, self.context)
        ]
        wanted = min(n_batches * self.batch_size, len(places))
        spread = [places[k * len(places) // wanted] for k in range(wanted)]
        size = self.batch_size
        return [self._windows(spread[k : k + size]) for k in range(0, max(1, wanted - size + 1), size)]

    def _long_enough(self, name: str) -> Shard:
        shard = self.shards[name]
        if shard.n_tokens < self.context + 1:
            raise DataError(
                f"the shard '{name}' has {shard.n_tokens} tokens, fewer than one window of "
                f"{self.context + 1} (the context and the next token): add text or lower the context"
            )
        return shard

    def _windows(self, rows: Sequence[tuple[Shard, int]]) -> Batch:
        ids = np.stack([shard.tokens[at : at + self.context + 1] for shard, at in rows]).astype(np.int64)
        tokens, targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
        target_bytes = self._token_bytes[targets]
        names = tuple(sorted({shard.name for shard, _ in rows}))
        weight = (target_bytes > 0).astype(np.float32)
        of_rows = tuple(shard.name for shard, _ in rows)
        return Batch(tokens, targets, weight, names, int(target_bytes.sum()), of_rows)


class ChatBatches:
    """Whole conversations, one a row, without replacement inside an epoch.

    Within a phase of the plan, rows are numbered through from the phase's first step. An epoch deals every
    document of the active shards in a seeded order of its own. With the weights of `Shards.plan()` each
    document comes exactly once an epoch; a shard with r times the weight per document has each of its
    documents floor(r) times and a seeded fraction of them once more. A new phase (quarantine, rollback)
    begins a new epoch.

    The weight is 1 on what the assistant wrote, `<|end|>` included. Raises `DataError` if a conversation
    does not fit the context: none is ever cut.
    """

    def __init__(self, shards: Shards, tok: Tokenizer, seed: int, batch_size: int, context: int) -> None:
        _check_sizes(shards, tok, batch_size, context)
        self.shards, self.seed, self.batch_size, self.context = shards, seed, batch_size, context
        self.tok = tok
        self._token_bytes = tok.token_bytes
        for shard in (shard for shard in shards.values() if shard.kind == "chat"):
            longest = int(shard.lengths.argmax())
            if shard.lengths[longest] - 1 > context:
                raise DataError(
                    f"conversation {longest} of '{shard.name}' has {shard.lengths[longest]} tokens and the "
                    f"context is {context}: shorten it or raise the context (it is never cut silently)"
                )
        # Pure functions of their arguments, so remembering them changes nothing but the time.
        self._epoch = lru_cache(maxsize=4)(self._deal)
        self._mask = lru_cache(maxsize=None)(self._mark)

    def batch(self, step: int, plan: DataPlan) -> Batch:
        """Return the batch of `step` (from 0): [batch_size, longest row, padded to a multiple of 8]."""
        phase = plan.at(step)
        names = _active(self.shards, plan, phase, "chat")
        key = (phase.from_step, names, tuple(phase.weights[name] for name in names))
        length = len(self._epoch(*key, 0))
        first = (step - phase.from_step) * self.batch_size
        rows = []
        for at in range(first, first + self.batch_size):
            which, document = self._epoch(*key, at // length)[at % length]
            rows.append((names[which], int(document)))
        return self._rows(rows)

    def epoch_length(self, step: int, plan: DataPlan) -> int:
        """Rows in an epoch of the phase in force at `step`."""
        phase = plan.at(step)
        names = _active(self.shards, plan, phase, "chat")
        return len(self._epoch(phase.from_step, names, tuple(phase.weights[n] for n in names), 0))

    def validation(self, names: Sequence[str], n_batches: int) -> list[Batch]:
        """Return the same batches every time: documents spread evenly over the named shards.

        Where the shards hold fewer than `n_batches` full batches, the list is shorter.
        """
        places = [(name, document) for name in names for document in range(self.shards[name].n_documents)]
        wanted = min(n_batches * self.batch_size, len(places))
        spread = [places[k * len(places) // wanted] for k in range(wanted)]
        size = self.batch_size
        return [self._rows(spread[k : k + size]) for k in range(0, max(1, wanted - size + 1), size)]

    def rows(self, documents: Sequence[tuple[str, int]]) -> Batch:
        """Return the named (shard, document) pairs as one batch, as training would see them."""
        return self._rows(documents)

    def _deal(
        self, from_step: int, names: tuple[str, ...], weights: tuple[float, ...], epoch: int
    ) -> np.ndarray:
        """Return one epoch's rows as (index into names, document), int64 [rows, 2]."""
        rng = generator("chat", self.seed, from_step, list(names), list(weights), epoch)
        sizes = [self.shards[name].n_documents for name in names]
        rates = [weight / size for weight, size in zip(weights, sizes, strict=True)]
        dealt = []
        for which, (rate, size) in enumerate(zip(rates, sizes, strict=True)):
            times = rate / min(rates)
            whole = int(times + 1e-9)  # a ratio of equal rates may fall a rounding error short of 1
            extra = rng.permutation(size)[: round((times - whole) * size)]
            documents = np.concatenate([np.tile(np.arange(size), whole), extra])
            dealt.append(np.stack([np.full(len(documents), which), documents], axis=1))
        return rng.permutation(np.concatenate(dealt), axis=0)

    def _mark(self, name: str) -> np.ndarray:
        """Return the loss mask of a whole shard, uint8 [n_tokens]; `<|bos|>` keeps documents apart."""
        return np.array(loss_mask(self.tok, self.shards[name].tokens.tolist()), dtype=np.uint8)

    def _rows(self, documents: Sequence[tuple[str, int]]) -> Batch:
        cut = []
        for name, i in documents:
            shard = self.shards[name]
            ids = shard.document(i)
            start = int(shard.offsets[i])
            cut.append((ids, self._mask(name)[start : start + len(ids)]))
        longest = max(len(ids) - 1 for ids, _ in cut)
        length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
        tokens = np.full((len(cut), length), self.tok.pad, dtype=np.int64)
        targets = tokens.copy()
        weight = np.zeros((len(cut), length), dtype=np.float32)
        for row, (ids, mask) in enumerate(cut):
            n = len(ids) - 1
            tokens[row, :n], targets[row, :n], weight[row, :n] = ids[:-1], ids[1:], mask[1:]
        n_bytes = int(self._token_bytes[targets][weight > 0].sum())
        of_rows = tuple(name for name, _ in documents)
        return Batch(tokens, targets, weight, tuple(sorted(set(of_rows))), n_bytes, of_rows)


def _active(shards: Shards, plan: DataPlan, phase: Phase, kind: str) -> tuple[str, ...]:
    """Return the names of the shards to draw from, after checking that they are the ones the plan means."""
    for name in phase.active:
        shard = shards[name]
        if shard.kind != kind:
            raise DataError(f"the shard '{name}' holds {shard.kind}; this stage draws {kind}")
        if plan.digests and plan.digests[name] != shard.digest:
            raise DataError(
                f"{shards.folder / name}.bin is not what the data plan was made for (digest "
                f"{shard.digest[:12]}..., plan {plan.digests[name][:12]}...): restore the data folder"
            )
    return phase.active


def _check_sizes(shards: Shards, tok: Tokenizer, batch_size: int, context: int) -> None:
    if batch_size < 1 or context < 1:
        raise DataError(f"batch_size and context must be at least 1, got {batch_size} and {context}")
    if shards.tokenizer_digest != tok.digest():
        raise DataError(
            f"{shards.folder} was packed with another tokenizer: {shards.tokenizer_digest[:12]}..."
        )
