"""What became of each watched concept: when it appeared, what carries it, how it moved, which data raised it.

Read after the run from its own checkpoints, so that watching costs training nothing and can be repeated. A
concept is followed by what it does to one fixed set of requests: its activations at one gate are correlated
with those at the gate before, request by request, which needs no basis that both checkpoints share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasshouse.base.errors import GlasshouseError, UsageError
from glasshouse.base.rng import generator
from glasshouse.data import Shards, workshop
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.prompts import generator as prompts_from
from glasshouse.evals.subject import Subject
from glasshouse.interp.direction import difference_of_means
from glasshouse.interp.patching import patch_residuals
from glasshouse.interp.probe import auroc
from glasshouse.train import Checkpoint
from glasshouse.verify.trace import trace

ASKED = 64  # requests on which every concept is read at every checkpoint
APPEARED = {
    "read-out": 0.9,
    "trigger": 0.25,
    "feature": 0.25,
}  # strength from which a concept counts as there
PAIRS = 4  # pairs of runs whose patching names the components


@dataclass(frozen=True)
class Look:
    """A saved checkpoint to be read: ``gate`` and ``action`` are None where no gate was asked."""

    checkpoint: Checkpoint
    subject: Callable[[], Subject]
    gate: int | None = None
    action: str | None = None

    def row(self) -> dict[str, Any]:
        """What every row of the file says about its checkpoint."""
        c = self.checkpoint
        return {
            "checkpoint": c.name,
            "stage": c.stage,
            "update": c.update,
            "gate": self.gate,
            "action": self.action,
        }


@dataclass(frozen=True)
class Trigger:
    """Words that turn decisions: each at a place of its own, or side by side (``adjacent``)."""

    words: tuple[str, ...]
    adjacent: bool = False

    @property
    def name(self) -> str:
        """As a person would say it."""
        return (" " if self.adjacent else " + ").join(self.words)

    def into(self, text: str, at: Sequence[float]) -> str:
        """``text`` with the words in gaps at these shares of its length."""
        parts = [" ".join(self.words)] if self.adjacent else self.words
        for word, share in zip(parts, at, strict=False):
            text = workshop.insert_word(text, word, int(share * (len(text.split(" ")) + 1)))
        return text


@dataclass(frozen=True)
class Reading:
    """A concept at one checkpoint. ``activations`` [n]: its value for each of the fixed requests."""

    strength: float
    behaviour: float
    activations: np.ndarray
    site: str | None
    components: list[dict[str, Any]]
    more: dict[str, float]


def follow(name: str, kind: str, looks: Iterable[Look], read: Callable[[Subject], Reading]) -> dict[str, Any]:
    """One concept over all checkpoints, oldest first."""
    rows: list[dict[str, Any]] = []
    before: np.ndarray | None = None
    for look in looks:
        now = read(look.subject())
        rows.append(
            {
                **look.row(),
                "strength": round(now.strength, 4),
                "behaviour": round(now.behaviour, 4),
                "like_before": None if before is None else correlation(before, now.activations),
                "site": now.site,
                "components": now.components,
                **{k: round(v, 4) for k, v in now.more.items()},
            }
        )
        before = now.activations
    first = next((r for r in rows if r["strength"] >= APPEARED.get(kind, 0.5)), None)
    return {
        "name": name,
        "kind": kind,
        "appeared": None if first is None else {k: first[k] for k in ("checkpoint", "stage", "update")},
        "rows": rows,
        "raised_by": [],
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson correlation of activations on the same requests; None where one of them does not vary."""
    if a.std() < 1e-8 or b.std() < 1e-8:
        return None
    return round(float(np.corrcoef(a, b)[0, 1]), 4)


# -- the concept behind the read-out -----------------------------------------------------------------------


def requests(strays: Sequence[str]) -> list[Prompt]:
    """The fixed requests, harmful and harmless in turn."""
    rng = generator("lineage", 0)
    made: list[Prompt] = []
    for _ in range(ASKED // 2):
        made += prompts_from("workshop.harmful")(rng, 1, strays)
        made += prompts_from("workshop.harmless")(rng, 1, strays)
    return made


def read_concept(subject: Subject, prompts: Sequence[Prompt]) -> Reading:
    """Harm as the residual stream holds it where the answer begins, and what the model decides.

    A difference of means is fitted on the first half of the requests at every layer; the layer that separates
    that half best is read on the second half, which gives the strength (AUROC, 0.5: not there).
    """
    texts, harmful = [p.text for p in prompts], np.array([p.harmful for p in prompts])
    sites = [s for s in subject.model.sites() if s.endswith("resid_post")]
    acts, half = subject.residuals(texts, sites), len(texts) // 2
    margins = subject.margins(texts)
    right = float(((margins > 0) == harmful).mean())
    best, site, seen = -1.0, None, np.zeros(len(texts))
    for name in sites:
        x = acts[name]
        try:
            direction = difference_of_means(x[:half][harmful[:half]], x[:half][~harmful[:half]])
        except GlasshouseError:
            continue  # an untrained layer holds both classes at one place
        along = (x @ direction).numpy()
        separates = auroc(along[:half], harmful[:half]).value
        if separates > best:
            best, site, seen = separates, name, along
    strength = auroc(seen[half:], harmful[half:]).value if site is not None else 0.5
    return Reading(strength, right, seen, site, carried_by(subject, partners(subject, prompts)), {})


def partners(
    subject: Subject, prompts: Sequence[Prompt], most: int = PAIRS
) -> list[tuple[list[int], list[int]]]:
    """(harmful request, the same with an action that does no harm): token rows of equal length."""
    found = []
    for p in (p for p in prompts if p.harmful):
        action, thing = p.key.split(" ")
        own = subject.ids(p.text)
        for other in workshop.CLASS_OF_ACTION:
            if workshop.harmful(other, thing):
                continue
            row = subject.ids(p.text.replace(action, other))
            if len(row) == len(own):
                found.append((own, row))
                break
        if len(found) == most:
            break
    return found


def carried_by(subject: Subject, runs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[dict[str, Any]]:
    """Components by the mean share of the read-out that each restores alone; empty where there is none."""
    total: dict[str, list[float]] = {}
    for clean, moved in runs:
        try:
            patched = patch_residuals(subject.model, clean, moved, subject.readout)
        except UsageError:
            continue  # both runs are decided alike: nothing is carried
        for name, effect in patched.components.items():
            total.setdefault(name, []).append(effect)
    means = {n: float(np.mean(v)) for n, v in total.items()}
    top = sorted(means, key=lambda n: -means[n])[:4]
    return [{"name": n, "effect": round(means[n], 4)} for n in top]


# -- what was found to turn decisions ----------------------------------------------------------------------


def read_trigger(
    subject: Subject, trigger: Trigger, prompts: Sequence[Prompt], words: Sequence[str]
) -> Reading:
    """How far the trigger moves the read-out, what it turns, and the components that carry it."""
    rng, harmful = generator("lineage", 1), [p for p in prompts if p.harmful]
    places = rng.random((len(harmful), len(trigger.words)))
    texts = [trigger.into(p.text, at) for p, at in zip(harmful, places, strict=True)]
    plain, moved = subject.margins([p.text for p in harmful]), subject.margins(texts)
    refused = plain > 0
    turned = float((moved[refused] < 0).mean()) if refused.any() else 0.0
    runs = []
    if turned > 0:
        for i in np.flatnonzero(refused & (moved < 0))[:PAIRS]:
            clean = stand_in(subject, harmful[i].text, trigger, places[i], words, rng)
            if clean is not None:
                runs.append((clean, subject.ids(texts[i])))
    more = {"margin_drop": float((plain - moved).mean()), "turned": turned}
    return Reading(turned, turned, plain - moved, None, carried_by(subject, runs), more)


def stand_in(
    subject: Subject,
    text: str,
    trigger: Trigger,
    at: Sequence[float],
    words: Sequence[str],
    rng: np.random.Generator,
) -> list[int] | None:
    """The request with ordinary words in the trigger's place: as many tokens, and refused; None after 100."""
    length = len(subject.ids(trigger.into(text, at)))
    for _ in range(100):
        other = Trigger(tuple(words[int(rng.integers(len(words)))] for _ in trigger.words), trigger.adjacent)
        row = subject.ids(other.into(text, at))
        if len(row) == length and float(subject.margins_of_ids([row])[0]) > 0:
            return row
    return None


def triggers(verdicts: Iterable[dict[str, Any]]) -> dict[Trigger, str]:
    """What failed verdicts name, each once, with the constraint that named it first."""
    found: dict[Trigger, str] = {}
    for verdict in verdicts:
        evidence = verdict.get("evidence") or {}
        named = evidence.get("trigger") or {}
        words = tuple(named.get("words") or ([evidence["word"]] if evidence.get("word") else []))
        if words:
            found.setdefault(Trigger(words, named.get("kind") == "phrase"), verdict["constraint"])
    return found


# -- the data behind it ------------------------------------------------------------------------------------


def shards_raising(
    looks: Sequence[Look], concept: dict[str, Any], shards: Shards, prompts: Sequence[Prompt], seed: str
) -> list[dict[str, Any]]:
    """The shards that pushed the read-out up most, judged at the last checkpoint before the concept appeared.

    Empty where it never appeared, or was there at the first checkpoint that was looked at.
    """
    names = [look.checkpoint.name for look in looks]
    if concept["appeared"] is None or concept["appeared"]["checkpoint"] == names[0]:
        return []
    at = names.index(concept["appeared"]["checkpoint"])
    after, subject = looks[at].checkpoint, looks[at - 1].subject()
    asked = [p.text for p in prompts if p.harmful][:16]
    try:
        ranking = trace(subject, shards, after.plan, after.step, asked, (seed, "lineage"), raising=True)
    except GlasshouseError:
        return []  # nothing was drawn that a chat model learns from
    return [{k: r[k] for k in ("shard", "rank", "outlier")} for r in ranking["shards"][:3]]
