"""The edges of a transformer: who writes into the residual stream, and which input of whom reads it.

Nodes and edges are named as the Mechanistic Interpretability Benchmark (MIB, Mueller et al. 2025,
arXiv 2504.13151) names them: ``input``, ``a{layer}.h{head}``, ``m{layer}``, ``logits``;
``m0->logits``, ``input->a0.h1<q>``. Every writer is joined to every later reader. A head has three readers
(query, key, value) *per query head*: where several query heads share one key/value head, each reads its own
copy, as MIB does. A block that is parallel has no edges from its heads to its MLP.

The GPT-2-small shape has 158 nodes and 32,491 edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.model import GPTConfig

PARTS = "qkv"


@dataclass(frozen=True)
class Graph:
    """Nodes and edges of one shape of model.

    Writers and readers are numbered in the order of computation: writers ``input``, then each layer's heads
    and its MLP; readers each layer's ``<q>`` of all heads, ``<k>``, ``<v>``, its MLP, at the end ``logits``
    (MIB's own order). ``split_input``: token and position embeddings are two nodes, ``embed`` and
    ``pos_embed``; otherwise ``input`` is the token embedding, and learned positions belong to what no edge
    carries (as in MIB), like the bias that attention adds.
    """

    n_layer: int
    n_head: int
    d_model: int
    parallel: bool = False
    split_input: bool = False

    @classmethod
    def of(cls, config: GPTConfig, *, split_input: bool = False) -> Graph:
        """The graph of a model. UsageError when edges through the stream do not describe the model."""
        if config.value_residual:
            raise UsageError(
                "value_residual hands the first layer's values to later layers outside the residual stream; "
                "edges do not describe such a model"
            )
        if config.roles is not None:
            raise UsageError("roles add to the stream what no node of a circuit writes; train without them")
        if split_input and config.position != "learned":
            raise UsageError("split_input needs learned positions; rotary ones are not in the stream")
        return cls(config.n_layer, config.n_head, config.d_model, config.parallel, split_input)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the nodes that write."""
        first = ["embed", "pos_embed"] if self.split_input else ["input"]
        blocks = [[f"a{i}.h{h}" for h in range(self.n_head)] + [f"m{i}"] for i in range(self.n_layer)]
        return (*first, *(name for block in blocks for name in block))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the inputs that read: ``a0.h0<q>``, ..., ``m0``, ..., ``logits``."""
        blocks = [
            [f"a{i}.h{h}<{p}>" for p in PARTS for h in range(self.n_head)] + [f"m{i}"]
            for i in range(self.n_layer)
        ]
        return (*(name for block in blocks for name in block), "logits")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, ``logits`` last."""
        return (*self.writers, "logits")

    @property
    def first(self) -> int:
        """How many writers stand before the first block."""
        return 2 if self.split_input else 1

    def written_before(self, layer: int, *, mlp: bool = False) -> int:
        """How many writers the attention (or the MLP) of ``layer`` can read; n_layer stands for logits."""
        n = self.first + layer * (self.n_head + 1)
        return n + self.n_head if mlp and not self.parallel else n

    def attention_readers(self, layer: int) -> slice:
        """The 3 n_head readers of a layer's attention: queries, keys, values."""
        start = layer * (3 * self.n_head + 1)
        return slice(start, start + 3 * self.n_head)

    def mlp_reader(self, layer: int) -> int:
        """The reader of a layer's MLP."""
        return layer * (3 * self.n_head + 1) + 3 * self.n_head

    def stage(self, reader: int) -> int:
        """When a reader reads: 2l for layer l's attention, 2l + 1 for its MLP, 2 n_layer for logits.

        In a parallel block the MLP reads with the attention.
        """
        layer, place = divmod(reader, 3 * self.n_head + 1)
        return 2 * layer + int(place == 3 * self.n_head and not self.parallel)

    def heard_from(self, writer: int) -> int:
        """The first stage that reads what ``writer`` wrote."""
        layer, place = divmod(writer - self.first, self.n_head + 1)
        if writer < self.first:
            return 0
        return 2 * layer + 1 if place < self.n_head and not self.parallel else 2 * layer + 2

    def first_reader(self, stage: int) -> int:
        """The first reader of a stage."""
        return self.mlp_reader(stage // 2) if stage % 2 else self.attention_readers(stage // 2).start

    def written_at(self, stage: int) -> int:
        """How many writers have written when ``stage`` begins."""
        return self.written_before(stage // 2, mlp=bool(stage % 2))

    @cached_property
    def valid(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [writer, reader]: which pairs are edges."""
        real = np.zeros((len(self.writers), len(self.readers)), dtype=bool)
        for layer in range(self.n_layer):
            real[: self.written_before(layer), self.attention_readers(layer)] = True
            real[: self.written_before(layer, mlp=True), self.mlp_reader(layer)] = True
        real[:, -1] = True
        return real

    @cached_property
    def pairs(self) -> np.ndarray:
        """int64 [edge, 2]: writer and reader of every edge, reader by reader."""
        reader, writer = np.nonzero(self.valid.T)
        return np.stack([writer, reader], axis=1)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of all edges, in the order of ``pairs``."""
        return tuple(f"{self.writers[w]}->{self.readers[r]}" for w, r in self.pairs)

    @cached_property
    def number(self) -> dict[str, int]:
        """Edge name -> its place in ``edges``."""
        return {name: i for i, name in enumerate(self.edges)}

    def find(self, names: Iterable[str | Sequence[str]]) -> np.ndarray:
        """Numbers int64 [n] of edges given as ``"m0->logits"`` or ``("m0", "logits")``.

        UsageError names the first that this graph lacks, and the nearest one it has.
        """
        found = []
        for name in names:
            text = name if isinstance(name, str) else "->".join(name)
            if text not in self.number:
                raise UsageError(f"this model has no edge {text!r}.{suggest(text, self.edges)}")
            found.append(self.number[text])
        return np.array(found, dtype=np.int64)

    def matrix(self, values: np.ndarray) -> np.ndarray:
        """[..., writer, reader] of values by edge [..., edge], zero where there is no edge."""
        out = np.zeros((*values.shape[:-1], *self.valid.shape), dtype=values.dtype)
        out[..., self.pairs[:, 0], self.pairs[:, 1]] = values
        return out

    def tensor(self, values: Tensor) -> Tensor:
        """[..., writer, reader] of values by edge [..., edge], else zero; gradients pass."""
        out = values.new_zeros((*values.shape[:-1], *self.valid.shape))
        w, r = torch.from_numpy(self.pairs.copy()).to(values.device).T
        out[..., w, r] = values
        return out

    @cached_property
    def owner(self) -> np.ndarray:
        """int64 [reader]: which writer a reader is an input of; -1 for logits."""
        place = {name: i for i, name in enumerate(self.writers)}
        return np.array([place.get(name.partition("<")[0], -1) for name in self.readers])

    def prune(self, kept: np.ndarray) -> np.ndarray:
        """``kept`` bool [edge] without edges that lie on no path from an embedding to logits.

        As MIB does before it evaluates: an edge whose writer reads nothing, or whose reader's node writes
        nothing, is dropped, until none is left.
        """
        live: np.ndarray[Any, np.dtype[np.bool_]] = self.matrix(np.asarray(kept, dtype=bool))
        w, r = self.pairs.T
        while True:
            speaks = live.any(axis=1)  # [writer]
            hears = np.zeros(len(self.writers), dtype=bool)
            hears[: self.first] = True
            hears[self.owner[:-1][np.asarray(live.any(axis=0))[:-1]]] = True
            fine = speaks & hears
            heard = np.append(fine[self.owner[:-1]], True)
            after = live & fine[:, None] & heard[None, :]
            if np.array_equal(after, live):
                return np.asarray(live[w, r])
            live = after

    def top(self, scores: np.ndarray, n: int, *, absolute: bool = True) -> np.ndarray:
        """bool [edge]: the ``n`` highest scores (by size, or signed); among equals the earlier edge."""
        order = np.argsort(-(np.abs(scores) if absolute else scores), kind="stable")
        kept = np.zeros(len(self.edges), dtype=bool)
        kept[order[:n]] = True
        return kept

    def greedy(self, scores: np.ndarray, n: int, *, absolute: bool = True) -> np.ndarray:
        """bool [edge]: ``n`` edges grown from logits, each time the highest score among edges into the set.

        Hanna et al. 2024 (arXiv 2403.17806), sec. 3: every edge taken leads to the logits.
        """
        size = np.abs(scores) if absolute else scores
        by_owner = self.owner[self.pairs[:, 1]]  # the writer that an edge feeds
        kept, open_ = np.zeros(len(self.edges), dtype=bool), by_owner == -1
        reached = np.zeros(len(self.writers), dtype=bool)
        for _ in range(min(n, len(self.edges))):
            best = int(np.argmax(np.where(open_ & ~kept, size, -np.inf)))
            if kept[best] or not open_[best]:
                break
            kept[best] = True
            writer = self.pairs[best, 0]
            if not reached[writer]:
                reached[writer] = True
                open_ |= by_owner == writer
        return kept

    def about(self) -> dict[str, int | bool]:
        """The shape, as MIB's circuit files state it."""
        return {
            "n_layers": self.n_layer,
            "n_heads": self.n_head,
            "parallel_attn_mlp": self.parallel,
            "d_model": self.d_model,
        }
