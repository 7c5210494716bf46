"""Two variables in all their combinations: the data on which composition is tested.

A grid holds one row of tokens for every pair (word of A, word of B), the class of each word, and the
hypothesis: which pairs of classes should be answered with yes. A model may get every pair right by adding up
a score for each word; whether it *combines* them shows in what no such sum can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError, suggest
from glasshouse.base.rng import generator
from glasshouse.base.score import Score
from glasshouse.interp.probes.rows import Bools, Floats
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit

Variable = Literal["a", "b", "both"]
BATCH = 256


@dataclass(frozen=True)
class Grid:
    """``tokens`` int64 [a, b, pos], padded on the right; ``at`` int64 [a, b]: where the answer is read.

    ``class_a`` [a], ``class_b`` [b]; ``truth`` bool [classes a, classes b]. ``held`` bool [a, b]: pairs that
    nothing is fitted on (best those the model did not train on either). ``yes``, ``no``: tokens that an
    answer begins with. ``places``: other positions [a, b] at which activations may be exchanged, by name.
    A place is called ``blocks.1.resid_mid``, where the answer is read, or ``blocks.1.resid_mid@b``.

    UsageError when shapes disagree or the hypothesis is a constant.
    """

    tokens: Tensor
    at: Tensor
    class_a: Tensor
    class_b: Tensor
    truth: Tensor
    held: Tensor
    yes: tuple[int, ...]
    no: tuple[int, ...]
    places: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self.tokens.shape[:2]
        found = (tuple(self.at.shape), tuple(self.held.shape), (len(self.class_a), len(self.class_b)),
                 *(tuple(p.shape) for p in self.places.values()))  # fmt: skip
        if self.tokens.ndim != 3 or any(shape != tuple(pairs) for shape in found):
            raise UsageError(f"a grid's tokens {list(self.tokens.shape)} do not fit {found}")
        if int(self.class_a.max()) >= len(self.truth) or int(self.class_b.max()) >= self.truth.shape[1]:
            raise UsageError(f"the hypothesis {list(self.truth.shape)} does not cover every class")
        y = self.label
        if y.all() or not y.any():
            raise UsageError("the hypothesis gives every pair the same answer; nothing is combined")
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise UsageError("yes and no need a token each, and none in common")
        if not self.held.any() or self.held.all():
            raise UsageError("some pairs must be held out and some not")

    @staticmethod
    def of(
        rows: Sequence[Sequence[Sequence[int]]],
        class_a: Sequence[int],
        class_b: Sequence[int],
        truth: Sequence[Sequence[bool]],
        held: Sequence[Sequence[bool]],
        yes: Sequence[int],
        no: Sequence[int],
        places: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> Grid:
        """A grid of token rows [a][b] of any length, the answer read after each row's last token."""
        longest = max(len(row) for line in rows for row in line)
        tokens = torch.tensor([[[*row, *([0] * (longest - len(row)))] for row in line] for line in rows])
        at = torch.tensor([[len(row) - 1 for row in line] for line in rows])
        return Grid(
            tokens,
            at,
            torch.as_tensor(class_a),
            torch.as_tensor(class_b),
            torch.as_tensor(truth),
            torch.as_tensor(held),
            tuple(yes),
            tuple(no),
            {name: torch.as_tensor(p) for name, p in (places or {}).items()},
        )

    @property
    def label(self) -> Tensor:
        """What the hypothesis answers [a, b]."""
        return self.truth[self.class_a][:, self.class_b]

    def place(self, where: str) -> tuple[str, Tensor]:
        """Site and positions [cells] of ``where``. UsageError for a place that this grid does not name."""
        site, _, name = where.partition("@")
        if name and name not in self.places:
            known = ", ".join(self.places) or "none"
            raise UsageError(
                f"{where!r}: the grid has no place {name!r}.{suggest(name, self.places)} It has: {known}"
            )
        return site, (self.places[name] if name else self.at).flatten()

    def dealt_anew(self, seed: int) -> Grid:
        """The same rows under a control hypothesis: each word's class dealt anew, evenly within a class.

        After Hewitt & Liang 2019: the shape of the hypothesis stays, its meaning is gone.
        """

        def dealt(classes: Tensor, name: str) -> Tensor:
            rng, out, n = generator("dealt anew", name, seed), classes.clone(), int(classes.max()) + 1
            for kind in range(n):
                words = rng.permutation((classes == kind).nonzero()[:, 0].numpy())
                out[torch.from_numpy(words)] = torch.arange(len(words)) % n
            return out

        return replace(self, class_a=dealt(self.class_a, "a"), class_b=dealt(self.class_b, "b"))

    def margin(self, logits: Tensor) -> Tensor:
        """log P(yes) - log P(no) [n] of next-token logits [n, vocab]."""
        return logits[:, list(self.yes)].logsumexp(-1) - logits[:, list(self.no)].logsumexp(-1)

    def cells(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of cell numbers ``n`` = a * len(b) + b."""
        return n // len(self.class_b), n % len(self.class_b)

    def rows(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [k, pos] and answer positions [k] of cells ``n`` [k]."""
        return self.tokens.flatten(0, 1)[n], self.at.flatten()[n]


@dataclass(frozen=True)
class Interchanges:
    """Pairs of runs: into ``base`` cells [n] goes a variable of ``source`` cells [n].

    ``label`` bool [n] is what the hypothesis then answers, ``moved`` bool [n] whether that differs from its
    answer to the base.
    """

    variable: Variable
    base: Tensor
    source: Tensor
    label: Tensor
    moved: Tensor


def interchanges(grid: Grid, variable: Variable, n: int, *, held: bool, seed: int) -> Interchanges:
    """``n`` random interchanges among cells held out or among the others; in half of them the answer moves.

    VerificationError when no interchange of this variable would move the answer: then it cannot be tested.
    """
    rng = generator("interchanges", variable, held, seed)
    pool = np.flatnonzero((grid.held == held).flatten().numpy())
    base, source = (torch.from_numpy(rng.choice(pool, 40 * n)) for _ in range(2))
    (a, b), (other_a, other_b) = grid.cells(base), grid.cells(source)
    new_a, new_b = (other_a if variable != "b" else a), (other_b if variable != "a" else b)
    own, label = grid.label[a, b], grid.label[new_a, new_b]
    moved, still = ((own != label) == side for side in (True, False))
    if min(int(moved.sum()), int(still.sum())) < n - n // 2:
        raise VerificationError(
            f"too few {'held-out ' if held else ''}pairs for interchanges of {variable!r} that move the "
            "answer and others that do not; hold out more combinations, or use more words"
        )
    chosen = torch.cat([moved.nonzero()[: n // 2, 0], still.nonzero()[: n - n // 2, 0]])
    chosen = chosen[torch.from_numpy(rng.permutation(n))]
    return Interchanges(variable, base[chosen], source[chosen], label[chosen], (own != label)[chosen])


@torch.no_grad()
def read(model: GPT, grid: Grid, where: str) -> Tensor:
    """Activations float32 [cells, d] of every row at ``where`` (see ``Grid``).

    UsageError for a site that does not exist or is not one vector at a position; VerificationError for NaN.
    """
    out, (site, place) = [], grid.place(where)
    for n in torch.arange(grid.at.numel()).split(BATCH):
        tokens, at = grid.rows(n)[0], place[n]
        with Taps(read=[site], stop_early=True) as taps:
            model.hidden(tokens.to(model.device), taps)
        x = taps[site]
        if x.ndim != 3:
            raise UsageError(f"{site!r} is {list(x.shape)}; composition reads residual sites [n, pos, d]")
        out.append(x[torch.arange(len(n)), at].float().cpu())
    found = torch.cat(out)
    if not bool(torch.isfinite(found).all()):
        raise VerificationError(f"activations at {where} hold NaN or infinity; nothing can be aligned")
    return found


def margins(model: GPT, grid: Grid, n: Tensor, edit: dict[str, Edit] | None = None) -> Tensor:
    """Answer margins [k] of cells ``n`` [k], with edits; gradients flow when they are enabled."""
    tokens, at = grid.rows(n)
    tokens, at = tokens.to(model.device), at.to(model.device)
    if edit:
        with Taps(edit=edit) as taps:
            hidden = model.hidden(tokens, taps)
    else:
        hidden = model.hidden(tokens)
    return grid.margin(model.unembed(hidden[torch.arange(len(n)), at]).float())


@torch.no_grad()
def all_margins(model: GPT, grid: Grid) -> Tensor:
    """Answer margins [a, b] of the whole grid. VerificationError when one is not finite."""
    out = torch.cat([margins(model, grid, n) for n in torch.arange(grid.at.numel()).split(BATCH)]).cpu()
    if not bool(torch.isfinite(out).all()):
        raise VerificationError("the model's answer is NaN or infinite; nothing was measured")
    return out.view(grid.at.shape)


def combination(values: Floats, label: Bools) -> float:
    """Share of the variance of ``values`` [a, b] that is the hypothesis' combination, relative to its own.

    Two-way analysis of variance: ``label`` [a, b] with row and column means taken out is what no sum of a
    score per word contains. 0: a bag of words; 1: as much combination as the truth table itself has.
    """
    table = label.astype(np.float64)
    contrast = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    size = float((contrast**2).sum())
    if size < 1e-9:
        raise VerificationError(
            "the hypothesis is itself a sum of a score per word; composition cannot be told from it"
        )
    total = float(((values - values.mean()) ** 2).sum())
    own = size / float(((table - table.mean()) ** 2).sum())
    return 0.0 if total < 1e-12 else float((values * contrast).sum()) ** 2 / size / total / own


def combination_score(values: Tensor, grid: Grid, seed: int = 0, draws: int = 200) -> Score:
    """``combination`` of ``values`` [a, b], its interval from drawing words of A and of B (Owen 2007)."""
    rng, x, y = generator("words", seed), values.double().numpy(), grid.label.numpy()
    found = []
    for _ in range(draws):
        a, b = rng.integers(len(x), size=len(x)), rng.integers(x.shape[1], size=x.shape[1])
        try:
            found.append(combination(x[a][:, b], y[a][:, b]))
        except VerificationError:  # a draw without both classes
            continue
    value = combination(x, y)
    low, high = np.quantile(found, [0.025, 0.975]) if found else (value, value)
    return Score(value, min(value, float(low)), max(value, float(high)), sum(x.shape))
