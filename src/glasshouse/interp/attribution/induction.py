"""Induction heads: which heads find what followed the last time, and copy it.

On rows of random tokens said twice nothing but the repetition predicts the second half. Three measurements of
every head (Olsson et al. 2022, arXiv 2209.11895, "Induction heads"), each with an interval over rows:

| score    | meaning                                                                                      |
|----------|----------------------------------------------------------------------------------------------|
| prefix   | attention from the second half to the token *after* the same token's first occurrence         |
| copying  | logits that the head adds directly to the token it should copy, less its mean over all tokens |
| ablation | nats that the loss on the second half grows by when the head's output is its mean over rows   |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from markupsafe import Markup
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.score import Score
from glasshouse.draw import esc, heat_map, styled, table
from glasshouse.interp.attribution.direct import frozen_scale
from glasshouse.interp.attribution.effects import Effects, effects
from glasshouse.interp.attribution.patch import ablate
from glasshouse.interp.attribution.places import Place
from glasshouse.interp.attribution.rerun import SEQUENCES, block, check_rows, row_chunks
from glasshouse.model import GPT, Taps

# Chosen before any model was looked at: a head that gives this much of its attention to one token in dozens
# does little else with it on such rows.
PREFIX = 0.3


@dataclass(frozen=True)
class InductionScores:
    """Scores of every head on ``n`` rows of ``period`` random tokens, said twice.

    ``prefix``, ``copying`` and ``ablation`` are `Effects` by head (``a1.h2``). ``loss``: nats a token on the
    first and second halves, without which the scores mean little: a model that does not gain on the second
    half does no induction. ``together``: `ablation` of all of `heads` at once, for heads that stand in for
    each other; ``others``: of as many heads that are not, of the same layers while there are some (None: no
    heads were named, or there are no others).
    """

    prefix: Effects
    copying: Effects
    ablation: Effects
    first: Effects
    second: Effects
    period: int
    together: Effects | None = None
    others: Effects | None = None

    @property
    def loss(self) -> tuple[Score, Score]:
        """Mean nats a token of the first and of the second half."""
        return self.first["loss"], self.second["loss"]

    def heads(self, prefix: float = PREFIX) -> list[str]:
        """Heads whose prefix score is at least ``prefix`` and whose copying is positive, by the lower ends of
        their intervals; highest prefix score first.
        """
        matched, copied = self.prefix.scores(), self.copying.scores()
        found = [h for h in matched if matched[h].low >= prefix and copied[h].low > 0]
        return sorted(found, key=lambda h: -matched[h].value)

    def __str__(self) -> str:
        first, second = self.loss
        lines = [f"nats a token: first half {first}, second half {second}"]
        lines += [
            f"  {h}  prefix {self.prefix[h]}  copying {self.copying[h]}  ablation {self.ablation[h]}"
            for h in self.heads()
        ]
        for whole in (self.together, self.others):
            if whole is not None:
                lines.append(f"  {whole.names[0]}  ablation together {whole[whole.names[0]]}")
        return "\n".join(lines if len(lines) > 1 else [*lines, "no induction heads"])

    def _repr_html_(self) -> str:
        scores = [e.scores() for e in (self.prefix, self.copying, self.ablation)]
        found = self.heads()
        ranked = sorted(scores[0], key=lambda h: -scores[0][h].value)[:8]
        rows = [[h, *(str(s[h]) for s in scores), "yes" if h in found else ""] for h in ranked]
        head = ["head", "prefix", "copying", "ablation", "induction head"]
        cells = dict(zip(self.prefix.cells, self.prefix.values, strict=True))
        layers, heads = (list(dict.fromkeys(c[i] for c in cells)) for i in (0, 1))
        grid = [[float(cells[(layer, h)]) for h in heads] for layer in layers]
        about = f"n = {self.prefix.n} rows of {self.period} random tokens, said twice"
        picture = heat_map(grid, layers, heads, "prefix score", about)
        losses = "nats a token: first half {}, second half {}".format(*self.loss)
        told = Markup("<p>{}; {}</p>").format(esc(about), esc(losses))
        return styled(told, picture, table(head, rows, about))


@torch.no_grad()
def induction_scores(
    model: GPT,
    *,
    n: int = 32,
    period: int | None = None,
    first: int | None = None,
    pool: Sequence[int] | None = None,
    seed: int = 0,
    sequences: int = SEQUENCES,
) -> InductionScores:
    """Score every head on ``n`` rows of ``period`` random tokens said twice (default: 24, or what fits).

    Tokens of a period are different, so that only one earlier place matches. ``first``: a token to begin
    every row with (a model's begin-of-text, where it was always trained with one). ``pool``: the token ids to
    draw from (None: all), for a vocabulary with tokens that the model never saw. UsageError when the context
    or vocabulary is too small for a period of 4.
    """
    start = 0 if first is None else 1
    drawn_from = [t for t in (range(model.config.vocab_size) if pool is None else pool) if t != first]
    room = min((model.config.context - start) // 2, len(drawn_from) // 2)
    period = min(24, room) if period is None else period
    if not 4 <= period <= room or n < 2:
        raise UsageError(
            f"induction needs a period of 4 to {room} tokens on this model (twice in its context) and two or "
            f"more rows; got {period} and {n}"
        )
    tokens = check_rows(model, repeated_rows(drawn_from, n, period, first, seed))
    metric = _SecondHalf(tokens, start + period)
    parts: dict[str, list[Tensor]] = {"prefix": [], "copying": [], "first": [], "second": []}
    for rows in row_chunks(n, sequences):
        for name, value in _scored(model, tokens[rows], start, period).items():
            parts[name].append(value)
    heads = [
        Place(f"blocks.{i}.z", h) for i in range(model.config.n_layer) for h in range(model.config.n_head)
    ]
    about = f"random tokens said twice, period {period}, seed {seed}"
    whole = {name: torch.cat(value, -1) for name, value in parts.items()}
    prefix, copying = (effects(heads, whole[name], about, name) for name in ("prefix", "copying"))
    ablation = ablate(model, tokens, metric, heads, kind="mean", sequences=sequences)
    first_half, second_half = (
        Effects(("loss",), whole[k][None].double(), about, f"{k} half", (("loss", k),))
        for k in ("first", "second")
    )
    found = InductionScores(prefix, copying, ablation, first_half, second_half, period)
    named = found.heads()
    if not named:
        return found
    layers = {name.split(".")[0] for name in named}
    rest = [p.name for p in heads if p.name not in named]
    rest = sorted(rest, key=lambda h: h.split(".")[0] not in layers)[: len(named)]
    joint = [
        ablate(model, tokens, metric, some, kind="mean", together=True, sequences=sequences) if some else None
        for some in (named, rest)
    ]
    return replace(found, together=joint[0], others=joint[1])


def repeated_rows(pool: Sequence[int], n: int, period: int, first: int | None, seed: int) -> Tensor:
    """int64 [n, (1 +) 2 * period]: ``first`` if given, then different tokens of ``pool``, then they again."""
    drawn, allowed = torch.Generator().manual_seed(seed), torch.tensor(pool)
    half = torch.stack([allowed[torch.randperm(len(allowed), generator=drawn)[:period]] for _ in range(n)])
    begin = torch.full((n, 0 if first is None else 1), first or 0)
    return torch.cat([begin, half, half], 1)


@dataclass(frozen=True)
class _SecondHalf:
    """Minus the mean loss, in nats, on the second half's tokens but its first, which nothing predicts."""

    tokens: Tensor
    begin: int

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return -_loss(logits, self.tokens[rows])[:, self.begin :].mean(1)


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats [n, T - 1] of the token that follows."""
    return -logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]


def _scored(model: GPT, tokens: Tensor, start: int, period: int) -> dict[str, Tensor]:
    """prefix and copying [layer * head, n]; first and second half's loss [n]."""
    config = model.config
    sites = [f"blocks.{i}.{s}" for i in range(config.n_layer) for s in ("pattern", "z")]
    with Taps(read=[*sites, f"blocks.{config.n_layer - 1}.resid_post"]) as taps:
        logits = model(tokens, taps)
    loss = _loss(logits, tokens)
    # Queries: the second half but its last token, whose successor is not in the row. Position p's token stood
    # at p - period before, so the key is p - period + 1, and the token to copy is what stands there.
    queries = torch.arange(start + period, start + 2 * period - 1, device=tokens.device)
    keys = queries - period + 1
    final = taps[f"blocks.{config.n_layer - 1}.resid_post"][:, queries]
    W = model.head_weight.float()
    target = W[tokens[:, keys]] - W.mean(0)  # [n, m, D]
    stream = frozen_scale(model.norm, final)[0](target)
    prefix, copying = [], []
    for layer in range(config.n_layer):
        part = block(model, layer)
        z = taps[f"blocks.{layer}.z"].transpose(1, 2)[:, queries].float()  # [n, m, H, K]
        written = part.attn.o(z.flatten(2).to(final.dtype))
        inner = frozen_scale(part.post1, written)[0](stream) @ part.attn.o.weight.float()
        copying.append((inner.unflatten(-1, (config.n_head, -1)) * z).sum(-1).mean(1).T)
        prefix.append(taps[f"blocks.{layer}.pattern"][:, :, queries, keys].float().mean(-1).T)
    return {
        "prefix": torch.cat(prefix),
        "copying": torch.cat(copying),
        "first": loss[:, start : start + period - 1].mean(1),
        "second": loss[:, start + period :].mean(1),
    }
