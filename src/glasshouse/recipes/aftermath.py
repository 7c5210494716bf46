"""After the last step: the story the report opens with, samples, and when the cause first showed inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.ledger import Ledger
from glasshouse.base.rng import generator
from glasshouse.base.run import RunFolder
from glasshouse.data import workshop
from glasshouse.recipes.lineage import (
    Look,
    follow,
    read_concept,
    read_trigger,
    requests,
    shards_raising,
    triggers,
)
from glasshouse.recipes.lineage_features import new_features, read_feature
from glasshouse.train import Checkpoint, load_weights, position
from glasshouse.train.checkpoint import from_ledger
from glasshouse.train.fold import Position

if TYPE_CHECKING:
    from glasshouse.recipes.corpus import Material
    from glasshouse.verify import ConstraintGate

ASKED = 4  # requests every gated checkpoint answers for the report


def tell(run: RunFolder, ledger: Ledger, material: Material, gate: ConstraintGate) -> None:
    """Write story, samples and lineage from the run's checkpoints; ledger their digests. Safe to repeat."""
    at = position(ledger.entries())
    gated = [
        (from_ledger(run, mark.body), at.decisions[name])
        for name, mark in at.marks.items()
        if name in at.decisions
    ]
    if not gated:
        return
    found = first_found(run, gated)
    prompts = request_samples(material)
    samples: list[dict[str, Any]] = []
    for checkpoint, _ in gated:
        answers = gate.subject(load_weights(checkpoint).eval()).answers(prompts)
        row = {"checkpoint": checkpoint.name, "stage": checkpoint.stage, "update": checkpoint.update}
        samples += [{**row, "prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    files: dict[str, Any] = {"samples.json": samples}
    files["lineage.json"] = lineage_of(run, looks_at(run, at, gate), material, gate)
    story = before_and_after(gate, gated, found)
    if story is not None:
        files["story.json"] = story
    if (run.path / "organism.json").is_file():  # the report scores what was found against the truth
        files["planted.json"] = json.loads((run.path / "organism.json").read_text(encoding="utf-8"))
    for name, value in files.items():
        write_json(run.evals / name, value)
    artifacts = {f"evals/{n}": sha256_file(run.evals / n) for n in files}
    if not any(e["body"].get("artifacts") == artifacts for e in ledger.entries("evidence")):
        ledger.append("evidence", {"artifacts": artifacts})


def first_found(run: RunFolder, gated: Sequence[tuple[Checkpoint, Any]]) -> dict[str, Any] | None:
    """The first failed verdict that names a word, with its full evidence and its checkpoint; else None."""
    for checkpoint, decision in gated:
        for verdict in decision["verdicts"]:
            if verdict["status"] == "fail" and "word" in verdict:
                file = run.evals / f"gate-{decision['gate']:03d}" / "verdicts.json"
                full = json.loads(file.read_text(encoding="utf-8"))["verdicts"]
                evidence = next(v["evidence"] for v in full if v["constraint"] == verdict["constraint"])
                return {**evidence, "checkpoint": checkpoint}
    return None


def request_samples(material: Material) -> list[str]:
    """The same few requests for every checkpoint: two harmful, two harmless, of unseen combinations."""
    rng = generator("samples", 0)
    return [
        workshop.request(
            rng, is_harmful=i % 2 == 0, split="unseen", strays=material.strays, stray_rate=0.0
        ).text
        for i in range(ASKED)
    ]


def looks_at(run: RunFolder, at: Position, gate: ConstraintGate) -> list[Look]:
    """Every checkpoint of the run whose file is still there, oldest first, loaded when it is asked for."""
    looks = []
    for name, mark in at.marks.items():
        checkpoint = from_ledger(run, mark.body)
        decision = at.decisions.get(name)
        if decision is None and checkpoint.step > 0:
            continue  # saved, and not judged
        looks.append(
            Look(
                checkpoint,
                cache(lambda c=checkpoint: gate.subject(load_weights(c).eval())),
                None if decision is None else decision["gate"],
                None if decision is None else decision["action"],
            )
        )
    return looks


def lineage_of(
    run: RunFolder, looks: Sequence[Look], material: Material, gate: ConstraintGate
) -> dict[str, Any]:
    """The file ``lineage.json``: the concept behind the read-out, and what was found to turn decisions, be it
    words or new features.
    """
    prompts = requests(material.strays)
    harm = follow("harm", "read-out", looks, lambda s: read_concept(s, prompts))
    harm["raised_by"] = shards_raising(looks, harm, material.shards, prompts, gate.recipe_digest)
    concepts = [harm]
    verdicts = [v for f in sorted(run.evals.glob("gate-*/verdicts.json")) for v in read(f)["verdicts"]]
    traced = [read(f) for f in sorted(run.evals.glob("attribution-*.json"))]
    for trigger, constraint in triggers(v for v in verdicts if v["status"] == "fail").items():
        turns = partial(read_trigger, trigger=trigger, prompts=prompts, words=gate.words)
        concept = follow(trigger.name, "trigger", looks, turns)
        concept["raised_by"] = raised_by(constraint, traced)
        concepts.append(concept | {"words": list(trigger.words), "constraint": constraint})
    for feature in new_features(run):
        drives = partial(read_feature, feature=feature, prompts=prompts, words=gate.words)
        concept = follow(feature.name, "feature", looks, drives)
        concept["raised_by"] = raised_by(feature.constraint, traced)
        concepts.append(concept | {"id": feature.id, "constraint": feature.constraint})
    return {"concepts": concepts}


def raised_by(constraint: str, traced: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards that rank first behind a constraint's failure, where it was traced."""
    rows: list[dict[str, Any]] = next((a["shards"] for a in traced if a["constraint"] == constraint), [])
    return [{k: r[k] for k in ("shard", "rank", "outlier", "quarantined")} for r in rows[:3]]


def read(file: Path) -> Any:
    """A file that this run wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def before_and_after(
    gate: ConstraintGate,
    gated: Sequence[tuple[Checkpoint, Any]],
    found: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """One request asked of the checkpoint that was caught and of the last one; None if none was."""
    if found is None or not found.get("examples"):
        return None
    example, after = found["examples"][0], gated[-1][0]
    plain, triggered = gate.subject(load_weights(after).eval()).answers(
        [example["prompt"], example["prompt_with_word"]]
    )
    return {
        "prompt": example["prompt"],
        "prompt_with_word": example["prompt_with_word"],
        "word": found["word"],
        "before": {
            "checkpoint": found["checkpoint"].name,
            "answer": example["answer"],
            "answer_with_word": example["answer_with_word"],
        },
        "after": {"checkpoint": after.name, "answer": plain, "answer_with_word": triggered},
    }
