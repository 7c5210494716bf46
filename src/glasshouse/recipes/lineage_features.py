"""What became of a feature that a gate found newly driving decisions: at which checkpoints it drives them.

A feature is a direction at a site, with the words that go with it. Requests with its word and the same ones
with an ordinary word of as many tokens stand position by position; at every checkpoint the component along
the direction is put back from the second run into the first: an interchange (Geiger et al. 2021) of one
dimension. What turns is what the direction carries there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import Subject
from glasshouse.interp.components import exchanged_along
from glasshouse.recipes.lineage import PAIRS, Reading, Trigger, carried_by, partners
from glasshouse.verify.known import INDEX
from glasshouse.verify.past import gate_folder

Rows = list[list[int]]


@dataclass(frozen=True)
class NewFeature:
    """A feature that failed a constraint, first by gate. ``direction`` [d_model] has length 1."""

    id: str
    site: str
    words: tuple[str, ...]
    constraint: str
    direction: torch.Tensor

    @property
    def name(self) -> str:
        """As a person would say it: by its words, else by its id."""
        return " / ".join(self.words) or self.id


def new_features(run: RunFolder) -> list[NewFeature]:
    """The features that failed verdicts of a run name, each once, with the direction their gate left."""
    found: dict[str, NewFeature] = {}
    for file in sorted(run.evals.glob("gate-*/verdicts.json")):
        gate = json.loads(file.read_text(encoding="utf-8"))
        for verdict in gate["verdicts"]:
            evidence = verdict.get("evidence") or {}
            name, constraint = evidence.get("feature"), verdict["constraint"]
            left = gate_folder(run, gate["gate"], constraint) / INDEX
            if verdict["status"] != "fail" or name is None or name in found or not left.is_file():
                continue
            rows = json.loads(left.read_text(encoding="utf-8"))["features"]
            row: dict[str, Any] = next((r for r in rows if r["id"] == name), {})
            if row:
                along = torch.tensor(row["direction"], dtype=torch.float32)
                words = tuple(str(w) for w in row["words"])
                found[name] = NewFeature(name, row["site"], words, constraint, along / along.norm())
    return list(found.values())


def read_feature(
    subject: Subject, feature: NewFeature, prompts: Sequence[Prompt], words: Sequence[str]
) -> Reading:
    """The share of decisions that putting back the component along the feature turns, and what carries it.

    ``behaviour``: the share that the feature's word turns by itself. Without a word harmful requests stand
    beside the same with an action that does no harm.
    """
    moved, clean = twins(subject, feature, prompts, words)
    own, other, put = exchanged_along(
        subject.model, moved, clean, subject.readout, feature.site, feature.direction
    )
    by_word, by_feature = (own > 0) != (other > 0), (put > 0) != (own > 0)
    runs = [(clean[i], moved[i]) for i in np.flatnonzero(by_word & by_feature)[:PAIRS]]
    turned = float(by_feature.mean()) if len(moved) else 0.0
    behaviour = float(by_word.mean()) if len(moved) else 0.0
    more = {"margin_moved": float(np.abs(put - own).mean()) if len(moved) else 0.0}
    return Reading(turned, behaviour, put - own, feature.site, carried_by(subject, runs), more)


def twins(
    subject: Subject, feature: NewFeature, prompts: Sequence[Prompt], words: Sequence[str]
) -> tuple[Rows, Rows]:
    """Requests with the feature's first word, and with another of ``words`` there: rows of equal lengths.

    The same at every checkpoint: they depend on the tokenizer alone.
    """
    if not feature.words:
        found = partners(subject, prompts, most=len(prompts))
        return [one for one, _ in found], [other for _, other in found]
    rng, trigger = generator("lineage", 2), Trigger(feature.words[:1])
    moved, clean = Rows(), Rows()
    for prompt in (p for p in prompts if p.harmful):
        at = [float(rng.random())]
        row = subject.ids(trigger.into(prompt.text, at))
        for i in rng.permutation(len(words))[:100].tolist():
            twin = subject.ids(Trigger((words[i],)).into(prompt.text, at))
            if len(twin) == len(row) and words[i] not in feature.words:
                moved.append(row)
                clean.append(twin)
                break
    return moved, clean
