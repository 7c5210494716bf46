"""The quality table: what dictionaries keep, cost, and stand for, every number with its interval.

| row                        | what it is                                                    | interval of|
|----------------------------|---------------------------------------------------------------|------------|
| loss recovered, zero       | (ablated - reconstruction) / (ablated - model) cross-entropy  | rows       |
| loss recovered, mean       | the same, with the site set to its mean over the text         | rows       |
| L0                         | active features at a position                                 | rows       |
| variance explained         | 1 - squared error / squared distance to the mean              | rows       |
| dead                       | features that never fired on the text                         | features   |
| sparse probing k=1, k=5    | held-out AUROC of the k best features, and of the activation  | concepts   |
| absorption                 | `concepts.absorption`                                         | concepts   |
| targeted perturbation      | `concepts.targeted_perturbation`                              | concepts   |
| matched, MMCS              | `stability.seed_stability`, where another seed is given       | features   |
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.draw import table
from glasshouse.interp.dictionaries.concepts import (
    Bools,
    Concepts,
    absorption,
    sparse_probing,
    targeted_perturbation,
)
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.dictionaries.splice import Spliced, check_fits, spliced
from glasshouse.interp.dictionaries.stability import seed_stability
from glasshouse.interp.dictionaries.stream import capture, device_of

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Quality:
    """Scores of one dictionary by name, and in words what they were measured on."""

    scores: dict[str, Score]
    measured: str

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def __str__(self) -> str:
        width = max(map(len, self.scores))
        return "\n".join(
            [*(f"{name:{width}}  {score}" for name, score in self.scores.items()), self.measured]
        )

    def _repr_html_(self) -> str:
        return quality_html({"dictionary": self})


def quality_html(columns: Mapping[str, Quality]) -> str:
    """Several dictionaries side by side, as an HTML table."""
    names = list(dict.fromkeys(name for one in columns.values() for name in one.scores))
    rows = [
        (name, *(str(one.scores[name]) if name in one.scores else "" for one in columns.values()))
        for name in names
    ]
    measured = "; ".join(dict.fromkeys(one.measured for one in columns.values()))
    return str(table(("", *columns), rows, measured, numeric=range(1, len(columns) + 1)))


def quality(
    dictionary: Dictionary,
    model: Any,
    tokens: Tensor,
    *,
    valid: Tensor | None = None,
    concepts: Mapping[str, Bools] | None = None,
    twin: Dictionary | None = None,
    seed: int = 0,
) -> Quality:
    """Judge ``dictionary`` on ``tokens`` int64 [n, pos], which it should not have been trained on.

    ``valid`` bool [n, pos]: positions that count. ``concepts``: name -> bool [n, pos] (such as
    `first_letters`); probes are judged on tokens of the vocabulary that they were not fitted on. ``twin``:
    the same dictionary from another seed. Raises UsageError when the dictionary is another model's,
    VerificationError when nothing can be concluded: no position counts, not finite, no concept common enough.
    """
    found = spliced(model, tokens, dictionary, valid=valid)
    scores = recovered(found) | kept(found)
    site, written = check_fits(dictionary, model)
    of = site if written == site else f"{site} to {written}"
    measured = f"{of}, {len(tokens)} rows, {int(found.positions.sum())} positions"
    for ablation in ("zero", "mean"):
        if f"loss recovered, {ablation}" not in scores:
            measured += f", {ablation} ablation costs nothing"
    if concepts:
        scores |= conceptual(dictionary, concepts_at(model, tokens, site, concepts, valid), seed)
        measured += f", {len(concepts)} concepts"
    if twin is not None:
        alive = torch.from_numpy(found.fired > 0)
        other = torch.from_numpy(spliced(model, tokens, twin, valid=valid).fired > 0)
        stable = seed_stability(dictionary, twin, alive=(alive, other), seed=seed)
        scores |= {"MMCS": stable.mmcs, "matched": stable.matched, "matched, random rows": stable.random}
    return Quality(scores, measured)


def conceptual(dictionary: Dictionary, labelled: Concepts, seed: int = 0) -> dict[str, Score]:
    """Sparse probing, and for autoencoders absorption and targeted perturbation, where they can be had: there
    is no absorption where no probe finds its concept, and no target where there is one concept.
    """
    probing = sparse_probing(dictionary, labelled, seed=seed)
    scores = {f"sparse probing {name}": score for name, score in probing.items()}
    if dictionary.config.is_transcoder:
        return scores
    for name, of in (("absorption", absorption), ("targeted perturbation", targeted_perturbation)):
        with suppress(VerificationError):  # the row is missing: nothing can be concluded
            scores[name] = of(dictionary, labelled, seed=seed)
    return scores


def recovered(found: Spliced) -> dict[str, Score]:
    """Loss recovered against zero and mean ablation, and the cross-entropies behind it, in nats.

    An ablation that does not make the text harder to predict (the interval of its cost reaches zero) leaves
    nothing to recover, and has no score. VerificationError when neither does.
    """
    scores = {}
    for ablation in ("zero", "mean"):
        cost = found.nats[ablation] - found.nats["model"]
        if of_rows(cost, found.targets).low > 0:
            scores[f"loss recovered, {ablation}"] = of_rows(
                found.nats[ablation] - found.nats["reconstruction"], cost
            )
    if not scores:
        raise VerificationError(
            "neither zero nor mean ablation of the site makes this text harder to predict: the site does "
            "nothing here that a dictionary could recover. Take more text, or text that the model knows"
        )
    for name in ("model", "reconstruction", "zero", "mean"):
        scores[f"cross-entropy, {name}"] = of_rows(found.nats[name], found.targets)
    return scores


def kept(found: Spliced) -> dict[str, Score]:
    """L0, variance explained, and the share of dead features."""
    if not found.spread.sum() > 0:
        raise VerificationError("the activations do not vary on this text: there is no variance to explain")
    return {
        "L0": of_rows(found.active, found.positions),
        "variance explained": of_rows(found.spread - found.missed, found.spread),
        "dead": rate(int((found.fired == 0).sum()), len(found.fired)),
    }


def of_rows(numerator: np.ndarray, denominator: np.ndarray) -> Score:
    """The ratio of two sums over rows, with the interval of drawing rows anew."""

    def ratio(rows: np.ndarray) -> float:
        at = rows.astype(np.int64)
        below = float(denominator[at].sum())
        return float(numerator[at].sum()) / below if below else 0.0

    return bootstrap(np.arange(len(numerator)), ratio)


def concepts_at(
    model: Any, tokens: Tensor, site: str, labels: Mapping[str, Bools], valid: Tensor | None = None
) -> Concepts:
    """Activations of ``site`` at the positions of ``tokens`` that count, with their labels; grouped by token.

    VerificationError when a label has another shape than the text.
    """
    counts = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
    wrong = sorted(name for name, y in labels.items() if np.shape(y) != tuple(tokens.shape))
    if wrong:
        raise VerificationError(f"label '{wrong[0]}' must have the shape of the text, {list(tokens.shape)}")
    device, parts = device_of(model), []
    for t, c in zip(tokens.split(ROWS_AT_ONCE), counts.split(ROWS_AT_ONCE), strict=True):
        parts.append(capture(model, t.to(device), [site])[site][c.to(device)].float())
    at = counts.cpu().numpy()
    return Concepts(
        torch.cat(parts), {name: np.asarray(y)[at] for name, y in labels.items()}, tokens.cpu().numpy()[at]
    )
