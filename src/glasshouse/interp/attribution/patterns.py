"""Attention patterns to look at: one small square a head, as SVG, without script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.draw.svg import el, figure, shorten, styled, text
from glasshouse.interp.attribution.places import node
from glasshouse.interp.attribution.rerun import check_rows
from glasshouse.model import GPT, Taps

FAINT = 0.02  # attention below it is not drawn: most cells are, and bytes are what makes a notebook slow


@dataclass(frozen=True)
class AttentionPatterns:
    """Attention [head, query, key] of named heads on one row of tokens; draws itself."""

    heads: tuple[str, ...]
    patterns: Tensor
    words: tuple[str, ...]

    def __getitem__(self, head: str) -> Tensor:
        if head not in self.heads:
            raise UsageError(f"{head} is not shown; there are {', '.join(self.heads)}")
        return self.patterns[self.heads.index(head)]

    def strongest(self, head: str, k: int = 5) -> list[tuple[int, int, float]]:
        """The ``k`` strongest edges of a head: (query, key, attention)."""
        pattern = self[head]
        values, at = pattern.flatten().topk(min(k, pattern.numel()))
        T = len(self.words)
        return [(int(i) // T, int(i) % T, float(v)) for v, i in zip(values, at, strict=True)]

    def _repr_html_(self) -> str:
        return styled(self.picture())

    def picture(self, width: float = 760) -> Markup:
        """Squares in rows; a query is a row and a key a column, the first token at the top left."""
        across = min(len(self.heads), max(1, int(width // 190)))
        side = min(width / across - 14, 420)  # a single one leaves room for its words
        parts: list[Markup] = []
        for i, head in enumerate(self.heads):
            x, y = (i % across) * (side + 14), (i // across) * (side + 30)
            parts.append(text(x, y + 12, head, "strong"))
            parts.append(self._square(i, x, y + 18, side))
        rows = (len(self.heads) + across - 1) // across
        about = "attention patterns: rows are queries, columns keys; darker is more"
        return figure(width, rows * (side + 30), "attention patterns", about, *parts)

    def _square(self, i: int, x: float, y: float, side: float) -> Markup:
        T, head = len(self.words), self.heads[i]
        size = side / T
        parts = [el("rect", x=x, y=y, width=side, height=side, class_="cell-back")]
        for q, k in (self.patterns[i] >= FAINT).nonzero().tolist():
            p = float(self.patterns[i, q, k])
            tip = el("title", f"{head}: {self.words[q]} ({q}) sees {self.words[k]} ({k}): {p:.2f}")
            box = {"x": x + k * size, "y": y + q * size, "width": size, "height": size}
            parts.append(el("rect", tip, **box, class_="cell", fill_opacity=f"{p:.2f}"))
        if len(self.heads) == 1 and size >= 12:
            parts += [
                text(x + side + 4, y + (q + 0.7) * size, shorten(w, 80)) for q, w in enumerate(self.words)
            ]
        return el("g", *parts)


@torch.no_grad()
def attention_pattern_view(
    model: GPT,
    tokens: Tensor | Sequence[int],
    heads: Sequence[str] | str | None = None,
    *,
    decode: Callable[[int], str] | None = None,
) -> AttentionPatterns:
    """The attention patterns of ``heads`` (names like ``a1.h2``; None: all) on one row of token ids [pos].

    UsageError for a head that does not exist, or more than one row.
    """
    row = torch.as_tensor(tokens)
    if row.ndim == 2 and len(row) == 1:
        row = row[0]
    if row.ndim != 1:
        raise UsageError(f"a pattern is shown of one row of token ids, not {list(row.shape)}")
    row = check_rows(model, row[None])
    config = model.config
    every = [f"a{i}.h{h}" for i in range(config.n_layer) for h in range(config.n_head)]
    names = every if heads is None else [heads] if isinstance(heads, str) else list(heads)
    places = [node(name, model) for name in names]
    if not places or any(p.part != "z" or p.head is None or p.pos is not None for p in places):
        raise UsageError(f"patterns belong to heads, named like a0.h1; got {names}")
    with Taps(read={f"blocks.{p.layer}.pattern" for p in places}) as taps:
        model.hidden(row, taps)
    shown = [taps[f"blocks.{p.layer}.pattern"][0, p.head].float().cpu() for p in places]
    words = tuple(decode(int(t)) if decode else f"#{int(t)}" for t in row[0])
    return AttentionPatterns(tuple(names), torch.stack(shown), words)
