"""Measure a behaviour with any edges cut: many edge sets in one pass, no more recomputed than must be.

Three things are not computed again. Positions before the first at which a row and its alternative differ
(causal models): their keys and values are kept. Positions after the last that the metric reads. Layers before
the first reader whose edges are cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError
from glasshouse.interp.circuits.ablation import Ablation, Kind, ablation
from glasshouse.interp.circuits.circuit import About
from glasshouse.interp.circuits.graph import Graph
from glasshouse.interp.circuits.split import Cut, Split, Stream
from glasshouse.interp.metric import Contrast, SomeRows
from glasshouse.model import GPT
from glasshouse.model.cache import KVCache
from glasshouse.model.digest import weights_digest

BUDGET = 2**26  # numbers that the writers' outputs of one pass may hold; a pass needs a few times this


class Patcher:
    """A model, the data of a behaviour and an ablation, ready to be measured with edges cut.

    ``clean`` [n]: the metric of the whole model; ``empty`` [n]: with every edge cut.
    ``live`` and ``alternative`` [W, n, T, D]: what every writer writes, and what a cut edge brings.
    ``gap``: the mean of ``clean`` less that of ``empty``.

    UsageError when the model has no such behaviour (the gap is zero or not finite), when rows do not fit the
    model, or when the model is one that edges do not describe.
    """

    def __init__(
        self,
        model: GPT,
        contrast: Contrast,
        ablate: Ablation | Kind = "corrupt",
        *,
        split_input: bool = False,
        sets_at_once: int | None = None,
    ):
        _check_rows(model, contrast)
        self.model, self.contrast, self.ablation = model, contrast, ablation(ablate)
        self.graph = Graph.of(model.config, split_input=split_input)
        self.split = Split(model, self.graph)
        self.at: Tensor | None = getattr(contrast.metric, "at", None)
        first, self.end = self._span()
        self.tokens = contrast.clean[:, first : self.end].to(model.device)
        self.length = self.tokens.shape[1]
        with torch.no_grad():
            self.prefix = self._prefix(first)
            self._record()
            if sets_at_once is None:
                sets_at_once = max(1, BUDGET // max(1, self.live[:, 0].numel()))
            self.sets_at_once = sets_at_once
            none = np.zeros((1, len(self.graph.edges)), dtype=bool)
            self.clean, self.empty = self._clean, self.measure(none)[0]
        self.gap = float(self.clean.double().mean() - self.empty.double().mean())
        if not np.isfinite(self.gap) or abs(self.gap) < 1e-6:
            raise UsageError(
                f"the metric is {float(self.clean.mean()):.6g} with the whole model and "
                f"{float(self.empty.mean()):.6g} with every edge cut ({self.ablation}): there is no "
                "behaviour whose circuit could be found. Check the contrast and the metric"
            )

    def __len__(self) -> int:
        return len(self.contrast)

    def _span(self) -> tuple[int, int]:
        """First position that can differ and the end of those that can matter."""
        clean, corrupt = self.contrast.clean, self.contrast.corrupt
        if not self.model.config.causal:
            return 0, clean.shape[1]
        end = clean.shape[1] if self.at is None else int(self.at.max()) + 1
        if self.ablation.kind != "corrupt":
            return 0, end
        differs = (clean != corrupt).any(0).nonzero()
        if not len(differs):
            raise UsageError("clean and corrupted rows are the same; the contrast shows nothing")
        first = int(differs[0]) if self.at is None else min(int(differs[0]), int(self.at.min()))
        return min(first, end - 1), end

    def _prefix(self, length: int) -> KVCache | None:
        """Keys and values of the positions before the first that differs."""
        if not length:
            return None
        config, weight = self.model.config, self.model.embed.weight
        cache = KVCache(config, len(self), length, weight.dtype, weight.device)
        self.model.hidden(self.contrast.clean[:, :length].to(weight.device), cache=cache)
        return cache

    def _record(self) -> None:
        """Run the model on the rows and on what the ablation needs."""
        stream = Stream()
        first = self.split.embed(self.tokens, self.past)
        final = self.split.run(stream, first, self.length, prefix=self.prefix)
        self.live, self.rests = torch.cat(stream.written), stream.rests
        self.final = stream.total  # [n, T, D], before the last norm
        if not torch.isfinite(self.live).all():
            raise UsageError("the model's activations on the clean rows are not all finite numbers")
        rows = torch.arange(len(self))
        self._clean = self.contrast.metric(self.unembed(final, rows), rows)
        self.alternative = self._alternative()

    @property
    def past(self) -> int:
        """How many positions are not computed again."""
        return self.prefix.length if self.prefix is not None else 0

    def _written(self, tokens: Tensor, prefix: KVCache | None = None) -> Tensor:
        """What every writer writes [W, rows, T, D] on rows of tokens."""
        stream = Stream()
        first = self.split.embed(tokens.to(self.model.device), prefix.length if prefix is not None else 0)
        self.split.run(stream, first, tokens.shape[1], prefix=prefix)
        return torch.cat(stream.written)

    def _alternative(self) -> Tensor:
        """What a cut edge brings [W, n, T, D]; a batch of one row when it is the same for all."""
        here, span = self.ablation, slice(self.past, self.end)
        contrast = self.contrast
        if here.kind == "zero":
            return torch.zeros_like(self.live)
        if here.kind == "corrupt":
            return self._written(contrast.corrupt[:, span], self.prefix)
        if here.kind == "resample":
            partner = here.partners(len(self))
            return (
                self.live[:, partner]
                if here.reference is None
                else self._written(self._reference(here.reference)[partner])
            )
        both = torch.cat([contrast.clean, contrast.corrupt]) if here.reference is None else here.reference
        both = self._reference(both)
        total = torch.zeros_like(self.live[:, :1])
        for start in range(0, len(both), len(self)):
            total += self._written(both[start : start + len(self)]).sum(1, keepdim=True)
        mean = total / len(both)
        if here.over_positions:
            mean = mean.mean(2, keepdim=True)
        return mean.expand_as(self.live)

    def _reference(self, rows: Tensor) -> Tensor:
        if rows.ndim != 2 or rows.shape[1] < self.end or not len(rows):
            raise UsageError(f"reference rows need {self.end} positions or more; got {list(rows.shape)}")
        return rows[:, : self.end]

    def unembed(self, final: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, pos, vocab] of normed streams [B, T, D] of data rows ``rows`` [B].

        A metric that says which one position of each row it reads (``at``) is shown that position's logits
        everywhere; for any other, positions that were not computed again come from the clean run.
        """
        if self.at is not None:
            place = self.at[rows].to(final.device) - self.past
            here = self.model.unembed(final[torch.arange(len(final), device=final.device), place])
            return here[:, None].expand(-1, self.end, -1)
        logits = self.model.unembed(final)
        if self.past:
            logits = torch.cat([self._before[rows.to(logits.device)].to(logits), logits], dim=1)
        return logits

    @cached_property
    def _before(self) -> Tensor:
        """Clean logits [n, past, vocab] of the positions that are not computed again."""
        with torch.no_grad():
            logits: Tensor = self.model(self.contrast.clean[:, : self.past].to(self.model.device))
        return logits

    def logits(self, keep: Tensor, start: int = 0) -> Tensor:
        """Logits [sets * n, pos, vocab], set by set, with edges cut where ``keep`` [sets, W, R] is 0.

        ``start``: a stage (`Graph.stage`) before which every edge is kept. Gradients reach ``keep``.
        """
        feed = Cut(keep, self.alternative)
        if start:
            feed.write(self.live[: self.graph.written_at(start)])
            for rest in self.rests[: 1 + (start + 1) // 2]:
                feed.write_rest(rest)
        first = None if start else self.split.embed(self.tokens, self.past)
        final = self.split.run(feed, first, self.length, start=start, prefix=self.prefix)
        return self.unembed(final, self.rows_of(len(keep)))

    def about(self, method: str, settings: Mapping[str, Any], seconds: float) -> About:
        """What a result of this patcher rests on."""
        metric = self.contrast.metric
        while isinstance(metric, SomeRows):
            metric = metric.whole
        name = type(metric).__name__
        where = (self.ablation, name, len(self), self.data_digest, self.model_digest)
        return About(method, str(where[0]), *where[1:], settings=dict(settings), seconds=seconds)

    @cached_property
    def model_digest(self) -> str:
        """Of the model's weights."""
        return weights_digest(self.model)

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the clean and corrupted rows, and of the reference rows if there are any."""
        whole = [self.contrast.clean, self.contrast.corrupt]
        whole += [] if self.ablation.reference is None else [self.ablation.reference]
        return digest_of([rows.tolist() for rows in whole])

    def prefix_of(self, rows: Tensor) -> KVCache | None:
        """Keys and values of some rows' earlier positions."""
        if self.prefix is None or len(rows) == len(self):
            return self.prefix
        part = copy.copy(self.prefix)
        part.k, part.v = ([x[rows] for x in side] for side in (self.prefix.k, self.prefix.v))
        return part

    def rows_of(self, sets: int) -> Tensor:
        """Data row numbers int64 [sets * n] of a pass over so many sets."""
        return torch.arange(len(self)).repeat(sets)

    def metric(self, keep: Tensor, start: int = 0) -> Tensor:
        """The metric [sets, n] of `logits`; gradients reach ``keep``."""
        rows = self.rows_of(len(keep))
        return self.contrast.metric(self.logits(keep, start), rows).view(len(keep), -1)

    @torch.no_grad()
    def measure(self, kept: np.ndarray) -> Tensor:
        """The metric [sets, n] of every edge set, ``kept`` bool [sets, edge] (in `Graph.edges` order)."""
        kept = np.atleast_2d(np.asarray(kept, dtype=bool))
        if kept.shape[1] != len(self.graph.edges):
            raise UsageError(f"edge sets need {len(self.graph.edges)} edges each; got {kept.shape[1]}")
        cut_from = np.where(kept.all(1), kept.shape[1], (~kept).argmax(1))  # first edge cut in each set
        out = torch.empty(len(kept), len(self))
        out[torch.from_numpy(kept.all(1))] = self._clean.float().cpu()
        order = np.argsort(cut_from, kind="stable")
        order = order[cut_from[order] < kept.shape[1]]
        for at in range(0, len(order), self.sets_at_once):
            chosen = order[at : at + self.sets_at_once]
            start = self.graph.stage(int(self.graph.pairs[cut_from[chosen[0]], 1]))
            keep = torch.from_numpy(self.graph.matrix(kept[chosen])).to(self.live.device)
            out[torch.from_numpy(chosen)] = self.metric(keep, start).float().cpu()
        return out


def _check_rows(model: GPT, contrast: Contrast) -> None:
    """Raise UsageError for rows that the model cannot read."""
    length, context, vocab = contrast.clean.shape[1], model.config.context, model.config.vocab_size
    if not 1 <= length <= context:
        raise UsageError(f"rows have {length} positions; this model reads 1 to {context}")
    for name, rows in (("clean", contrast.clean), ("corrupt", contrast.corrupt)):
        if int(rows.min()) < 0 or int(rows.max()) >= vocab:
            raise UsageError(f"{name} rows hold ids outside this model's vocabulary of {vocab}")
