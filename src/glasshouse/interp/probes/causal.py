"""Does the model use what a probe reads? Ablate the direction, patch along it, steer it; compare with random.

A behaviour is a number for each row (above 0: it happens), asked with edits in place. ``decision`` makes one
of a model, rows and a ``Metric``; any callable of the same form does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.interp.direction import project_out, random_directions, steer
from glasshouse.interp.metric import Contrast, Metric
from glasshouse.interp.probes.rows import Array, Bools, Floats, plain
from glasshouse.model import GPT, Taps
from glasshouse.model.taps import Edit

Decision = Callable[[Mapping[str, Edit] | None], Array]
Operation = Literal["ablate", "patch", "steer"]
Along = Callable[[Tensor], Edit]
BATCH = 64


def decision(model: GPT, tokens: Tensor, metric: Metric, batch: int = BATCH) -> Decision:
    """The behaviour ``metric`` of rows ``tokens`` int64 [n, pos], as a function of edits."""

    @torch.no_grad()
    def decide(edit: Mapping[str, Edit] | None) -> Tensor:
        out = []
        for rows in torch.arange(len(tokens)).split(batch):
            if edit:
                with Taps(edit=edit) as taps:
                    logits = model(tokens[rows], taps)
            else:
                logits = model(tokens[rows])
            out.append(metric(logits, rows).float().cpu())
        return torch.cat(out)

    return decide


@dataclass(frozen=True)
class Effect:
    """What one operation along a direction does to the behaviour, beside the same along random directions.

    ``effect``: mean change over rows, in the behaviour's units; ``random``: of each random direction
    (its ``n`` counts directions, its interval is theirs). ``flipped``: share of rows whose sign changes;
    ``random_flipped``: mean of that share. ``p``: share of directions, itself among them, with an effect as
    large: at most 1 / (1 + n).
    """

    operation: str
    how: str
    effect: Score
    random: Score
    flipped: Score
    random_flipped: Score
    p: float


@dataclass(frozen=True)
class Causal:
    """The effects of one direction: at which sites it was edited, how random directions were drawn."""

    sites: tuple[str, ...]
    directions: str
    effects: tuple[Effect, ...]

    def __getitem__(self, operation: str) -> Effect:
        for effect in self.effects:
            if effect.operation == operation:
                return effect
        raise UsageError(
            f"{operation!r} was not measured; there are {', '.join(e.operation for e in self.effects)}"
        )


def causal_effect(
    direction: Tensor,
    x: Array,
    y: Bools,
    decide: Decision,
    sites: str | Sequence[str],
    *,
    towards: bool = False,
    operations: Sequence[Operation] = ("ablate", "patch", "steer"),
    amount: float = 2.0,
    n_random: int = 8,
    drawn: Literal["sphere", "covariance"] = "sphere",
    seed: int = 0,
) -> Causal:
    """Effects on ``decide`` of editing ``direction`` [d] at ``sites``, at every position.

    ``x`` [n, d] with classes ``y`` [n] say where along a direction the classes lie. The rows that ``decide``
    asks about should be of the class other than ``towards``:
    ablate sets the component to its mean over both classes; patch sets it to the mean of class ``towards``;
    steer adds ``amount`` times the distance to that class. Random directions, drawn from the ``sphere`` or in
    proportion to the activations' ``covariance`` (harder to beat), get the same operation, in steering of the
    same length. UsageError for a direction of another width; VerificationError when behaviour is NaN.
    """
    acts, names = np.asarray(plain(x), np.float64), (sites,) if isinstance(sites, str) else tuple(sites)
    if acts.ndim != 2 or len(direction) != acts.shape[1]:
        raise UsageError(f"a direction [{len(direction)}] does not fit activations {list(acts.shape)}")
    unit = (direction / direction.norm()).float()
    goal, other = (torch.from_numpy(acts[y == side].mean(0)).float() for side in (towards, not towards))
    length = float((goal - other) @ unit)
    along: dict[str, tuple[str, Along]] = {
        "ablate": (
            "component set to its mean over both classes",
            lambda d: project_out(d, (goal + other) / 2),
        ),
        "patch": ("component set to the mean of the other class", lambda d: project_out(d, goal)),
        "steer": (f"{amount:g} class distances added ({amount * length:+.3g})",
                  lambda d: steer(d, amount * length)),
    }  # fmt: skip
    strays = _random(acts, n_random, drawn, seed)
    before = _asked(decide, None)

    def effect(operation: Operation) -> Effect:
        how, make = along[operation]
        own = _asked(decide, dict.fromkeys(names, make(unit)))
        others = [_asked(decide, dict.fromkeys(names, make(d))) for d in strays]
        return compared(operation, how, before, own, others)

    return Causal(names, drawn, tuple(effect(o) for o in operations))


def compared(operation: str, how: str, before: Floats, own: Floats, others: Sequence[Floats]) -> Effect:
    """An effect from the behaviour [n] before, after, and after each random edit."""
    moved = own - before
    stray = [float((o - before).mean()) for o in others]
    flips = [float(((o > 0) != (before > 0)).mean()) for o in others]
    as_large = sum(abs(s) >= abs(float(moved.mean())) for s in stray)
    return Effect(
        operation,
        how,
        bootstrap(moved),
        bootstrap(stray),
        rate(int(((own > 0) != (before > 0)).sum()), len(own)),
        bootstrap(flips),
        (1 + as_large) / (1 + len(others)),
    )


@torch.no_grad()
def patch_along(
    model: GPT, contrast: Contrast, site: str, direction: Tensor, *, n_random: int = 8, seed: int = 0
) -> Effect:
    """Interchange: the component along ``direction`` [d] of each clean row, put into its corrupt twin.

    At every position of ``site``; all else stays the corrupt run's. ``effect`` is in the metric's units, from
    the corrupt run; what the whole clean activation would bring is the clean run less the corrupt one.
    """
    rows = torch.arange(len(contrast))

    def measured(tokens: Tensor, along: Tensor | None = None) -> Floats:
        out = []
        for part in rows.split(BATCH):
            edit: dict[str, Edit] = {}
            if along is not None:
                with Taps(read=[site], stop_early=True) as taps:
                    model.hidden(contrast.clean[part], taps)
                edit = {site: exchange(taps[site], along)}
            with Taps(edit=edit) as taps:
                out.append(contrast.metric(model(tokens[part], taps), part).float().cpu())
        return finite(torch.cat(out).double().numpy())

    before, unit = measured(contrast.corrupt), (direction / direction.norm()).float()
    strays = random_directions(n_random, len(unit), generator("random directions", seed))
    others = [measured(contrast.corrupt, d) for d in strays]
    how = "component of the clean run put into its corrupt twin"
    return compared("interchange", how, before, measured(contrast.corrupt, unit), others)


def exchange(source: Tensor, unit: Tensor) -> Edit:
    """An edit that gives ``x`` [n, pos, d] the component along ``unit`` [d] of ``source`` [n, pos, d]."""

    def edit(x: Tensor) -> Tensor:
        amount = ((source - x).float() @ unit).unsqueeze(-1)
        return (x.float() + amount * unit).to(x.dtype)

    return edit


def _asked(decide: Decision, edit: Mapping[str, Edit] | None) -> Floats:
    found = np.asarray(plain(decide(edit)), np.float64)
    if found.ndim != 1 or not len(found):
        raise UsageError(f"a behaviour is one number for each row [n], got {list(found.shape)}")
    return finite(found)


def finite(behaviour: Floats) -> Floats:
    """``behaviour`` [n]. VerificationError when one is NaN or infinite: it would be above no bound."""
    if not np.isfinite(behaviour).all():
        raise VerificationError("the behaviour is NaN or infinite under an edit; nothing was measured")
    return behaviour


def _random(acts: Floats, n: int, drawn: str, seed: int) -> Sequence[Tensor]:
    rng = generator("random directions", seed)
    if n < 1:
        raise UsageError("an effect needs at least one random direction to stand beside")
    if drawn == "sphere":
        return random_directions(n, acts.shape[1], rng)
    if drawn != "covariance":
        raise UsageError(f"random directions are drawn from 'sphere' or 'covariance', not {drawn!r}")
    mixed = rng.standard_normal((n, len(acts))) @ (acts - acts.mean(0))  # covariance that of the rows
    return list(torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).float())
