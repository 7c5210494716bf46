"""Whether features stand for concepts that we can name: sparse probing, absorption, targeted perturbation.

All three compare features with linear probes on the same activations. A concept labels every position.
Probes are fitted on some groups of positions (such as tokens of the vocabulary) and judged on others, so that
nothing can be known by heart.

* Sparse probing: Gurnee et al. 2023, arXiv 2305.01610. The k features whose means differ most between the
  classes, against the whole activation.
* Absorption: Chanin et al. 2024, arXiv 2409.14507, with the thresholds of SAEBench (Karvonen et al. 2025,
  arXiv 2503.09532). Deviations: concepts are any labels and not only first letters in a spelling prompt;
  projections are measured from the mean of the other class, because a residual stream is far from zero.
* Targeted probe perturbation: SAEBench, after Marks et al. 2024. Features of one concept are taken out of the
  activations (what the dictionary missed stays), which should spoil that concept's probe and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.probe import LinearProbe, auroc, fit_logistic

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

LEAST = 16  # positions of either class, in either half, below which a concept is left out
SPLIT_GAIN = 0.03  # F1 that one more feature must add to count among the main ones (Chanin et al.)
MOST_MAIN = 10
ALIGNED = 0.025  # cosine of an absorbing feature's row with the probe, at least (SAEBench)
KNOWN = 0.8  # held-out AUROC that a concept's probe must have before anything can be said to absorb it
SHARE = 0.4  # of the activation's projection that it must make up, at least (SAEBench)


@dataclass(frozen=True)
class Concepts:
    """Activations ``x`` [n, d_in], ``labels`` name -> bool [n], and the ``groups`` int [n] that are kept
    together when positions are split into those to fit and those to judge on.
    """

    x: Tensor
    labels: Mapping[str, Bools]
    groups: Ints

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or not self.labels:
            raise VerificationError("concepts need activations [n, d_in] and at least one label")
        wrong = [name for name, y in self.labels.items() if len(y) != len(self.x)]
        if wrong or len(self.groups) != len(self.x):
            raise VerificationError(f"{wrong or 'groups'}: one label for each of {len(self.x)} activations")


@dataclass(frozen=True)
class _Task:
    """One concept, balanced: positions to fit on and to judge on, classes alike in number."""

    name: str
    fit: Ints
    judge: Ints
    y: Bools


def tasks(concepts: Concepts, seed: int = 0, most: int = 2000) -> list[_Task]:
    """Concepts with enough of both classes on both sides of a split by groups; at most ``most`` positions of
    a class on a side. VerificationError when none has enough.
    """
    rng = generator("concepts", seed)
    distinct = np.unique(concepts.groups)
    to_fit = np.isin(concepts.groups, rng.permutation(distinct)[: (len(distinct) + 1) // 2])
    made = []
    for name, y in concepts.labels.items():
        sides = []
        for side in (to_fit, ~to_fit):
            yes, no = np.flatnonzero(side & y), np.flatnonzero(side & ~y)
            n = min(len(yes), len(no), most)
            sides.append(np.sort(np.concatenate([rng.permutation(yes)[:n], rng.permutation(no)[:n]])))
        if min(map(len, sides)) >= 2 * LEAST:
            made.append(_Task(name, sides[0], sides[1], np.asarray(y, dtype=bool)))
    if not made:
        raise VerificationError(
            f"none of {len(concepts.labels)} concepts has {LEAST} positions of either class among the groups "
            "to fit on and among those to judge on; give more text or commoner concepts"
        )
    return made


@dataclass(frozen=True)
class Standard:
    """A logistic probe on standardised inputs, in raw units: scores are ``x @ weight + bias``."""

    weight: Floats
    bias: float

    def __call__(self, x: Floats) -> Floats:
        return np.asarray(x @ self.weight + self.bias)


def fit(x: Floats, y: Bools) -> Standard:
    """Logistic regression on ``x`` [n, width], each column scaled to deviation one first."""
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation < 1e-9] = 1.0
    probe: LinearProbe = fit_logistic((x - mean) / deviation, y)
    weight = probe.weight / deviation
    return Standard(weight, float(probe.bias - mean @ weight))


def best_features(features: Floats, y: Bools) -> Ints:
    """Feature numbers by how much their mean differs between the classes, the largest difference first."""
    return np.argsort(-np.abs(features[y].mean(0) - features[~y].mean(0)), kind="stable")


@torch.no_grad()
def encoded(dictionary: Dictionary, x: Tensor, at: Ints) -> Floats:
    """Features [len(at), d_sae] of some rows of ``x``."""
    rows = [dictionary.encode(part) for part in x[torch.from_numpy(at)].split(1024)]
    found: Floats = torch.cat(rows).double().cpu().numpy()
    return found


def raw(x: Tensor, at: Ints) -> Floats:
    """Some rows of ``x`` in float64."""
    found: Floats = x[torch.from_numpy(at)].double().cpu().numpy()
    return found


def written(dictionary: Dictionary) -> Floats:
    """What one unit of each feature adds to the activation, [d_sae, d_in]. UsageError for a transcoder."""
    if dictionary.config.is_transcoder:
        raise UsageError("a transcoder's features are not written where it reads: this needs an autoencoder")
    found: Floats = (dictionary.W_dec / dictionary.scale_out).detach().double().cpu().numpy()
    return found


def over(values: list[float]) -> Score:
    """The mean over concepts, with the interval of drawing concepts anew."""
    return bootstrap(values)


# -- sparse probing ----------------------------------------------------------------------------------------


def sparse_probing(
    dictionary: Dictionary, concepts: Concepts, ks: tuple[int, ...] = (1, 5), seed: int = 0
) -> dict[str, Score]:
    """Held-out AUROC of probes on the best ``k`` features, mean over concepts; "dense": on the activation."""
    found: dict[str, list[float]] = {name: [] for name in (*(f"k={k}" for k in ks), "dense")}
    for task in tasks(concepts, seed):
        features, judged = (encoded(dictionary, concepts.x, at) for at in (task.fit, task.judge))
        y, truth = task.y[task.fit], task.y[task.judge]
        order = best_features(features, y)
        for k in ks:
            best = order[:k]
            found[f"k={k}"].append(auroc(fit(features[:, best], y)(judged[:, best]), truth).value)
        probe = fit(raw(concepts.x, task.fit), y)
        found["dense"].append(auroc(probe(raw(concepts.x, task.judge)), truth).value)
    return {name: over(values) for name, values in found.items()}


# -- absorption --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Absorbed:
    """Of ``found`` positions where a probe sees the concept, in ``absorbed`` its main features are silent and
    one other feature stands in for them. ``by``: that feature -> how often. ``probe``: its held-out AUROC.
    """

    concept: str
    main: tuple[int, ...]
    found: int
    absorbed: int
    by: dict[int, int]
    probe: float


def main_features(features: Floats, y: Bools) -> tuple[int, ...]:
    """The features that stand for a concept: best ones are added while F1 grows by `SPLIT_GAIN`."""
    order, chosen, best = best_features(features, y), 1, -1.0
    for k in range(1, min(MOST_MAIN, features.shape[1]) + 1):
        said = fit(features[:, order[:k]], y)(features[:, order[:k]]) > 0
        f1 = 2 * float((said & y).sum()) / max(1.0, float(said.sum() + y.sum()))
        if f1 < best + SPLIT_GAIN:
            break
        best, chosen = f1, k
    return tuple(int(i) for i in order[:chosen])


def absorption_by_concept(dictionary: Dictionary, concepts: Concepts, seed: int = 0) -> list[Absorbed]:
    """Absorption of every concept (see `absorption`)."""
    rows = written(dictionary)
    return [_absorbed(dictionary, concepts, task, rows) for task in tasks(concepts, seed)]


def _absorbed(dictionary: Dictionary, concepts: Concepts, task: _Task, rows: Floats) -> Absorbed:
    y, truth = task.y[task.fit], task.y[task.judge]
    x, judged = raw(concepts.x, task.fit), raw(concepts.x, task.judge)
    probe, main = fit(x, y), main_features(encoded(dictionary, concepts.x, task.fit), y)
    sees, length = auroc(probe(judged), truth).value, np.linalg.norm(probe.weight)
    if length == 0:
        return Absorbed(task.name, main, 0, 0, {}, sees)
    unit = probe.weight / length
    along = rows @ unit  # what one unit of a feature adds to the projection
    cosine = along / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    seen = truth & (probe(judged) > 0)
    features = encoded(dictionary, concepts.x, task.judge)[seen]
    projection = (judged[seen] - x[~y].mean(0)) @ unit
    part = features * along
    top = part.argmax(1)
    lone = (
        (features[:, list(main)] == 0).all(1)
        & ~np.isin(top, main)
        & (cosine[top] >= ALIGNED)
        & (projection > 0)
        & (part[np.arange(len(top)), top] >= SHARE * projection)
    )
    by, counts = np.unique(top[lone], return_counts=True)
    table = dict(zip(by.tolist(), counts.tolist(), strict=True))
    return Absorbed(task.name, main, int(seen.sum()), int(lone.sum()), table, sees)


def absorption(dictionary: Dictionary, concepts: Concepts, seed: int = 0) -> Score:
    """The share of positions where a probe sees the concept but its main features do not fire and one other
    feature makes up `SHARE` of the projection in their place; mean over the concepts that are `KNOWN`.

    VerificationError when no probe finds its concept in held-out groups.
    """
    found = [
        one for one in absorption_by_concept(dictionary, concepts, seed) if one.found and one.probe >= KNOWN
    ]
    if not found:
        raise VerificationError("no probe finds its concept in held-out activations: nothing can be absorbed")
    if len(found) == 1:
        return rate(found[0].absorbed, found[0].found)
    return over([one.absorbed / one.found for one in found])


# -- targeted perturbation ---------------------------------------------------------------------------------


def targeted_perturbation(
    dictionary: Dictionary, concepts: Concepts, n_features: int = 5, seed: int = 0
) -> Score:
    """How much accuracy a concept's probe loses without the concept's ``n_features`` features, beyond what
    the other concepts' probes lose; mean over concepts. 0.5 is the most: from always right to chance.

    Features are chosen on the positions that probes were fitted on: by the difference of their means times
    what a unit adds to the probe's score. VerificationError for fewer than two concepts.
    """
    found = tasks(concepts, seed)
    if len(found) < 2:
        raise VerificationError("targeted perturbation compares concepts: give at least two that are common")
    rows = written(dictionary)
    probes, chosen = [], []
    for task in found:
        y = task.y[task.fit]
        features = encoded(dictionary, concepts.x, task.fit)
        probe = fit(raw(concepts.x, task.fit), y)
        effect = (features[y].mean(0) - features[~y].mean(0)) * (rows @ probe.weight)
        probes.append(probe)
        chosen.append(np.argsort(-effect, kind="stable")[:n_features])
    lost = np.zeros((len(found), len(found)))  # [features of, probe of]
    for j, (task, probe) in enumerate(zip(found, probes, strict=True)):
        x, truth = raw(concepts.x, task.judge), task.y[task.judge]
        features, whole = encoded(dictionary, concepts.x, task.judge), probe(x)
        right = float(((whole > 0) == truth).mean())
        for i, features_i in enumerate(chosen):
            without = whole - features[:, features_i] @ (rows[features_i] @ probe.weight)
            lost[i, j] = right - float(((without > 0) == truth).mean())
    others = (lost.sum(1) - np.diag(lost)) / (len(found) - 1)
    return over((np.diag(lost) - others).tolist())


# -- concepts of a text ------------------------------------------------------------------------------------


def first_letters(tokenizer: Any, tokens: Tensor) -> dict[str, Bools]:
    """For each letter, whether a token of ``tokens`` int64 [n, pos] begins with it (a space before it does
    not count, case neither): name -> bool [n, pos]. The task of Chanin et al., on our tokens.
    """
    ids = tokens.unique().tolist()
    letters = {i: tokenizer.decode([i]).lstrip(" ▁")[:1].lower() for i in ids}
    names = sorted({c for c in letters.values() if c.isascii() and c.isalpha()})
    grid = tokens.cpu().numpy()
    return {name: np.isin(grid, [i for i in ids if letters[i] == name]) for name in names}


def token_kinds(tokenizer: Any, tokens: Tensor) -> dict[str, Bools]:
    """What tokens of ``tokens`` int64 [n, pos] look like, which small models know too: name -> bool [n, pos].

    "begins a word" (a space first), "capital", "punctuation", "long" (five letters or more), "vowel" (first).
    """
    ids = tokens.unique().tolist()
    text = {i: tokenizer.decode([i]) for i in ids}
    bare = {i: t.strip(" ▁") for i, t in text.items()}
    kinds = {
        "begins a word": [i for i in ids if text[i][:1] in (" ", "▁") and bare[i][:1].isalpha()],
        "capital": [i for i in ids if bare[i][:1].isupper()],
        "punctuation": [i for i in ids if bare[i] and not any(c.isalnum() for c in bare[i])],
        "long": [i for i in ids if len(bare[i]) >= 5 and bare[i].isalpha()],
        "vowel": [i for i in ids if bare[i][:1].lower() in tuple("aeiou")],
    }
    grid = tokens.cpu().numpy()
    return {name: np.isin(grid, members) for name, members in kinds.items()}
