"""What else could explain a probe's score: its capacity (control task) and the words themselves (leakage)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score
from glasshouse.interp.probe import auroc, control_labels
from glasshouse.interp.probes.core import Probe, ProbeConfig, fit_probe
from glasshouse.interp.probes.quality import Groups, Z, area, grouped_bootstrap
from glasshouse.interp.probes.rows import Array, Bools, Floats, activations

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """Activations [n, d] or [n, pos, d] of one site with the mask [n, pos] of the positions that are read."""

    x: Floats
    mask: Bools | None = None

    def fit(self, y: Bools, rows: Rows, config: ProbeConfig, group: Groups, seed: int) -> Probe:
        """A probe fitted on ``rows``."""
        mask = None if self.mask is None else self.mask[rows]
        return fit_probe(self.x[rows], y[rows], config, mask=mask, groups=group[rows].tolist(), seed=seed)

    def score(self, probe: Probe, rows: Rows) -> Floats:
        """Its scores of ``rows``."""
        return probe.score(self.x[rows], None if self.mask is None else self.mask[rows])


def settled(config: ProbeConfig, strength: float | None) -> ProbeConfig:
    """``config`` with the penalty that validation chose, so that controls are fitted alike and cheaply."""
    if strength is None:
        return config
    return ProbeConfig.model_validate(
        config.model_dump() | {"alpha" if config.kind == "ridge" else "c": strength}
    )


@dataclass(frozen=True)
class Control:
    """The control task of Hewitt & Liang 2019: every meaning gets a random label, learned by the same probe.

    ``task`` and ``control`` AUROC are of one split, in which held-out rows have meanings seen in fitting: the
    control can only be learned by heart. ``selectivity`` is their difference; ``labelings`` random labels
    were drawn.
    """

    task: Score
    control: Score
    selectivity: Score
    labelings: int


def control_task(
    reading: Reading,
    y: Bools,
    keys: Sequence[str],
    config: ProbeConfig,
    *,
    labelings: int = 5,
    seed: int = 0,
) -> Control | None:
    """Selectivity of a probe; None when too few meanings recur, so that nothing could be learned by heart.

    ``keys`` [n]: the meaning of each row. The interval of the difference adds the task's variance (over
    meanings) to that between labelings.
    """
    half = generator("control split", seed).random(len(y)) < 0.5
    known = {k for k, h in zip(keys, half, strict=True) if h}
    again = np.array([not h and k in known for k, h in zip(keys, half, strict=True)])
    fit, held = np.flatnonzero(half), np.flatnonzero(again)
    ids = np.unique(np.asarray(keys), return_inverse=True)[1]
    if len(set(ids[held].tolist())) < 4:
        return None
    alone = np.arange(len(y))

    def tested(labels: Bools) -> Floats:
        return reading.score(reading.fit(labels, fit, config, alone, seed), held)

    task = area(tested(y), y[held], ids[held])
    found = []
    for i in range(labelings):
        fake = control_labels(list(keys), generator("control labels", seed, i))
        found.append(auroc(tested(fake), fake[held]).value)
    mean, spread = float(np.mean(found)), float(np.std(found, ddof=1)) if labelings > 1 else 0.25
    error = spread / math.sqrt(labelings)
    control = Score(mean, max(0.0, mean - Z * error), min(1.0, mean + Z * error), labelings)
    half_width = Z * math.hypot((task.high - task.low) / (2 * Z), error)
    gain = task.value - mean
    return Control(task, control, Score(gain, gain - half_width, gain + half_width, task.n), labelings)


@dataclass(frozen=True)
class Leakage:
    """How much of a probe's AUROC the concept's own words explain; what was not measured is None.

    ``words``: a probe on word counts alone, same split; ``words_explain``: its share of the AUROC above 1/2
    (0: words say nothing about held-out meanings, 1: as much as the activations).
    ``masked``: the probe as fitted, on activations in which the evidence was replaced or masked;
    ``masked_refit``: a probe fitted and tested there; ``masking_removes``: share of the AUROC above 1/2 that
    is gone even when fitted again. 1: nothing but those words told; 0: the rest tells as well.
    """

    words: Score | None = None
    words_explain: Score | None = None
    masked: Score | None = None
    masked_refit: Score | None = None
    masking_removes: Score | None = None


def leakage(
    full: Floats,
    y: Bools,
    parts: tuple[Rows, Rows],
    group: Groups,
    config: ProbeConfig,
    probe: Probe,
    *,
    masked: Reading | None,
    words: Floats | None,
    seed: int = 0,
) -> Leakage:
    """Leakage of ``probe``, whose test rows score ``full``; ``parts``: rows to fit, rows to test."""
    fit, held = parts
    ids, truth, out = group[held], y[held], Leakage()
    if words is not None:
        plain = ProbeConfig(kind="logistic", c=1.0, standardise=False)
        surface = Reading(words)
        scores = surface.score(surface.fit(y, fit, plain, group, seed), held)
        explain = share(full, scores, truth, ids, seed)
        out = replace(out, words=area(scores, truth, ids), words_explain=explain)
    if masked is not None:
        again = masked.score(masked.fit(y, fit, config, group, seed), held)
        kept = share(full, again, truth, ids, seed)
        out = replace(
            out,
            masked=area(masked.score(probe, held), truth, ids),
            masked_refit=area(again, truth, ids),
            masking_removes=Score(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n),
        )
    return out


def share(full: Floats, part: Floats, truth: Bools, group: Groups, seed: int) -> Score:
    """AUROC above 1/2 of ``part`` over that of ``full``, within 0 and 1; interval by drawing groups.

    Nothing to explain (``full`` at or below 1/2) is all explained: the share is 1.
    """

    def of(rows: Rows) -> float:
        y = truth[rows]
        if y.all() or not y.any():
            return math.nan
        whole, some = auroc(full[rows], y).value - 0.5, auroc(part[rows], y).value - 0.5
        return 1.0 if whole <= 0 else min(1.0, max(0.0, some / whole))

    return grouped_bootstrap(of, group, seed=seed, draws=200)


def bag_of_words(texts: Sequence[str]) -> Floats:
    """Counts [n, vocabulary] of each text's words (letters, digits; case folded), words in sorted order."""
    split = [re.findall(r"\w+", t.casefold()) for t in texts]
    known = {w: i for i, w in enumerate(sorted({w for words in split for w in words}))}
    if not known:
        raise UsageError("the texts hold no words")
    out = np.zeros((len(texts), len(known)))
    for row, words in enumerate(split):
        for w in words:
            out[row, known[w]] += 1
    return out


def same_rows(x: Array, like: Floats, what: str) -> Floats:
    """``x``, checked against the unmasked ``like``. VerificationError: NaN; UsageError: another shape."""
    out = activations(x, what)
    if out.shape != like.shape:
        raise UsageError(f"{what}: {list(out.shape)} are not the rows of {list(like.shape)}")
    return out


def evident(mask: Bools, evidence: Bools) -> Bools:
    """``mask`` without ``evidence`` positions. VerificationError when a row would have none left."""
    left = mask & ~evidence
    if not left.any(1).all():
        raise VerificationError(
            f"row {int((~left.any(1)).argmax())} has no position left once its evidence is masked; "
            "leave it out, or read more positions"
        )
    return left
