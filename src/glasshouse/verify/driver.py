"""A new feature on trial: what undoing it does to decisions, on prompts that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.evals.subject import Subject, finite
from glasshouse.interp.dictionaries.changes import Encoded, encoded, unit_directions
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.direction import random_directions
from glasshouse.model import Taps
from glasshouse.model.taps import Edit
from glasshouse.verify.examination import Examination, sequentially
from glasshouse.verify.known import Known
from glasshouse.verify.sequential import SequentialTest

FRESH = 128  # prompts in a round; a feature that hardly any of them activates gets more, up to `n_max`
ACTIVE = 0.5  # of its activation where it was tried, from which a feature counts as active on a fresh row
CONTROLS = 64  # rows on which a random direction stands beside it
BATCH = 64  # rows in one forward pass


@dataclass(frozen=True)
class Driver:
    """A feature of one site: what it turned in the search, its share of the change, what it is about."""

    site: str
    number: int
    turned: float
    moved: float
    energy: float
    level: float
    tried: tuple[int, ...]
    words: tuple[str, ...]
    examples: tuple[dict[str, Any], ...]
    known: Known
    direction: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """As evidence."""
        return {
            "id": self.known.id,
            "label": self.known.label,
            "site": self.site,
            "number": self.number,
            "turned_in_search": self.turned,
            "margin_moved": self.moved,
            "share_of_change": self.energy,
            "words": list(self.words),
            "followed_by": self.known.seen_before,
        }


@dataclass(frozen=True)
class Pool:
    """One site's learned dictionary with the rows it was learned from, and their margins [n]."""

    site: str
    dictionary: Dictionary
    found: Encoded
    margins: np.ndarray


@torch.no_grad()
def put_back(
    subject: Subject,
    found: Encoded,
    site: str,
    pairs: Sequence[tuple[int, int]],
    unit: Tensor,
    sign: float = 1.0,
) -> np.ndarray:
    """Margins [pairs] of (row, feature) with this model's change along the feature's direction undone.

    Where the feature is active, the component of the activation along ``unit`` [S, d] is put back to what it
    is in the other checkpoint (``sign`` -1: brought to it, for the other checkpoint's own run). The whole
    component and not only the feature's own activation: neighbouring features share directions, and each
    would be found to do little. VerificationError when a margin is not finite.
    """
    subject.spend(len(pairs))
    out = np.empty(len(pairs), dtype=np.float32)
    order = np.argsort([len(found.rows[i]) for i, _ in pairs], kind="stable")
    for begin in range(0, len(order), BATCH):
        chosen = [pairs[c] for c in order[begin : begin + BATCH]]
        width = max(len(found.rows[row]) for row, _ in chosen)
        tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
        amount = torch.zeros(len(chosen), width)
        for k, (row, j) in enumerate(chosen):
            here, n = slice(found.start[row], found.start[row + 1]), len(found.rows[row])
            tokens[k, :n] = torch.as_tensor(found.rows[row], dtype=torch.int64)
            amount[k, :n] = (found.x[here] @ unit[j]) * (found.features[here, j] > 0)
        part = sign * amount[..., None] * unit[[j for _, j in chosen]][:, None]
        last = torch.tensor([len(found.rows[row]) - 1 for row, _ in chosen])
        with subject.precision(), Taps(edit={site: _less(part)}) as taps:
            hidden = subject.model.hidden(tokens, taps)
            logits = subject.model.unembed(hidden[torch.arange(len(chosen)), last])
        out[order[begin : begin + BATCH]] = subject.readout.margin(logits).numpy()
    return finite(out)


def _less(part: Tensor) -> Edit:
    return lambda x: x - part.to(x.dtype)


@dataclass
class Trial:
    """A driver's sequential test on fresh rows, how many there were, and what a random direction turned."""

    test: SequentialTest
    active: int = 0
    controls: list[bool] = field(default_factory=list)  # turned by a random direction
    brought: list[bool] = field(default_factory=list)  # turned in the older checkpoint by adding the feature
    failing: list[str] = field(default_factory=list)


def share_of(turned: Sequence[bool]) -> float:
    """Share of decisions turned; 0 of none."""
    return float(np.mean(turned)) if turned else 0.0


def confirm(exam: Examination, older: Subject, pool: Pool, driver: Driver, shares: int) -> Trial:
    """Undo one feature where it is active: on fresh prompts, most with its words, and on rows not tried.

    Prompts come in rounds until the test has decided or the constraint's ``n_max`` of them were drawn.
    """
    trial = Trial(exam.test(shares=shares))
    for k in range(max(1, exam.constraint.prompts.n_max // FRESH)):
        purpose = f"fresh {driver.site} {driver.number} {k}"
        rows, texts = with_words(exam, purpose, driver.words)
        if k == 0:
            kept = _kept_back(pool, driver)
            rows += kept
            texts += [exam.subject.tokenizer.decode(row).strip() for row in kept]
        _round(exam, older, pool, driver, trial, rows, texts)
        if trial.test.state != "undecided":
            break
    return trial


def _kept_back(pool: Pool, driver: Driver) -> list[list[int]]:
    """Rows that the search did not try and on which the feature is active."""
    active = (pool.found.peaks()[0][:, driver.number] > 0).nonzero().flatten().tolist()
    return [list(pool.found.rows[i]) for i in active if i not in driver.tried][:FRESH]


def _round(
    exam: Examination,
    older: Subject,
    pool: Pool,
    driver: Driver,
    trial: Trial,
    rows: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> None:
    """Feed a trial with those of ``rows`` on which the feature is active."""
    subject, site, unit = exam.subject, driver.site, unit_directions(pool.dictionary)
    subject.spend(2 * len(rows))
    with subject.precision():
        found = encoded(pool.dictionary, older.model, subject.model, rows, site)
    peak = found.peaks()[0][:, driver.number]
    active = [i for i in range(len(rows)) if float(peak[i]) >= ACTIVE * driver.level]
    trial.active += len(active)
    if not active:
        return
    whole = subject.margins_of_ids([rows[i] for i in active])

    def outcomes(start: int, n: int) -> list[float]:
        pairs = [(i, driver.number) for i in active[start : start + n]]
        turned = (put_back(subject, found, site, pairs, unit) > 0) != (whole[start : start + n] > 0)
        trial.failing += [texts[i] for (i, _), t in zip(pairs, turned, strict=True) if t]
        made: list[float] = turned.astype(float).tolist()
        return made

    sequentially(trial.test, outcomes, len(active))
    pairs = [(i, driver.number) for i in active[: max(0, CONTROLS - len(trial.controls))]]
    if not pairs:
        return
    stray = unit.clone()
    stray[driver.number] = random_directions(1, unit.shape[1], exam.rng(f"random {site} {driver.number}"))[0]
    other = put_back(subject, found, site, pairs, stray)
    trial.controls += ((other > 0) != (whole[: len(pairs)] > 0)).tolist()
    stood = older.margins_of_ids([rows[i] for i, _ in pairs])
    brought = put_back(older, found, site, pairs, unit, sign=-1.0)
    trial.brought += ((brought > 0) != (stood > 0)).tolist()


def with_words(exam: Examination, purpose: str, words: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Fresh prompts as token rows and texts: half with the first of ``words`` put in, some with the next."""
    rng, texts = exam.rng(f"words {purpose}"), []
    for k, prompt in enumerate(exam.draw(purpose, min(FRESH, exam.constraint.prompts.n_max))):
        if words and k % 4:
            word, gap = words[min(k % 4 // 3, len(words) - 1)], int(rng.integers(len(prompt.words) + 1))
            texts.append(prompt.insert(word, gap))
        else:
            texts.append(prompt.text)
    return [exam.subject.ids(text) for text in texts], texts
