"""Rolling back: the data behind a failure, and the checkpoint from before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.run import RunFolder
from glasshouse.data import Shards
from glasshouse.evals.subject import Subject
from glasshouse.model import GPT
from glasshouse.train import Checkpoint, Decision, GateRecord, load_weights
from glasshouse.verify.repair import Repair, repaired
from glasshouse.verify.rollback import rollback_target
from glasshouse.verify.trace import to_quarantine, trace


def roll_back(
    model: GPT,
    checkpoint: Checkpoint,
    history: tuple[GateRecord, ...],
    named: Sequence[dict[str, Any]],
    reason: str,
    *,
    run: RunFolder,
    gate: int,
    shards: Shards,
    quarantine: int,
    seed: tuple[str, ...],
    subject: Callable[[GPT], Subject],
    repairs: Mapping[str, Repair | None],
) -> Decision:
    """Find the data behind the first failure that can be traced, and where to go back to.

    One that shows prompts is traced by them; one that names shards itself (`blamed`) is taken at its word.
    ``model`` fails, ``subject`` makes a model ready to be asked; ``quarantine`` is the most
    shards to drop, ``repairs`` what each constraint wants done instead.
    """
    shown, ranking = traceable(named, checkpoint, shards)
    if shown is None:
        return Decision("stop", f"{reason}; the failure shows no prompts to trace, so a person must look")
    failing, reference = (shown["evidence"].get(k, []) for k in ("failing_prompts", "reference_prompts"))
    if ranking is None:
        before = before_cause(subject(model), history, failing, reference, subject)
        ranking = trace(before, shards, checkpoint.plan, checkpoint.step, failing, seed)
        dropped = to_quarantine(ranking, quarantine)
    else:
        dropped = tuple(sorted(row["shard"] for row in ranking["shards"][:quarantine] if row["named"]))
    for row in ranking["shards"]:
        row["quarantined"] = row["shard"] in dropped
    file: Path = run.evals / f"attribution-{gate:03d}.json"
    write_json(
        file, {"gate": gate, "checkpoint": checkpoint.name, "constraint": shown["constraint"], **ranking}
    )
    target = rollback_target(history, checkpoint, dropped)
    said = f"{reason}; {', '.join(dropped)} ranks first behind it"
    found = {str(file.relative_to(run.path)): sha256_file(file)}
    if target is None:
        said += ", and there is no earlier checkpoint to go back to"
        return Decision("stop", said, drop_shards=dropped, artifacts=found)
    decision = Decision("rollback", said, target.name, dropped, artifacts=found)
    return repaired(decision, repairs.get(shown["constraint"]), subject(model), failing, reference, run)


def traceable(
    named: Sequence[dict[str, Any]], checkpoint: Checkpoint, shards: Shards
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The failure to trace, and its own ranking of shards where it shows no prompts but names some."""
    for verdict in named:
        if verdict["evidence"].get("failing_prompts"):
            return verdict, None
    for verdict in named:
        ranking = blamed(verdict["evidence"], checkpoint, shards)
        if ranking is not None:
            return verdict, ranking
    return None, None


def blamed(evidence: Mapping[str, Any], checkpoint: Checkpoint, shards: Shards) -> dict[str, Any] | None:
    """Shards that a verdict's own evidence ranks, in the form of `trace`; None where it names none of them.

    ``shard`` is the one that a statistic found guilty, with all others ranked in ``shards``; or ``shards``
    maps each guilty one to how much of the failure it holds. What training has not drawn from by
    ``checkpoint``, or what was quarantined before, is not behind it.
    """
    drawn = {n for p in checkpoint.plan.phases if p.from_step < max(checkpoint.step, 1) for n in p.active}
    found = evidence.get("shards") or {}
    if isinstance(found, Mapping):
        rows = [{"shard": n, "score": float(held), "named": True} for n, held in found.items()]
    else:
        guilty = evidence.get("shard")
        rows = [
            {"shard": r["shard"], "score": float(r["score"]), "named": r["shard"] == guilty} for r in found
        ]
    rows = [r for r in rows if r["shard"] in drawn and r["shard"] in shards]
    if not any(r["named"] for r in rows):
        return None
    rows.sort(key=lambda r: (not r["named"], -r["score"]))
    for rank, row in enumerate(rows, start=1):
        row |= {"rank": rank, "documents": shards[row["shard"]].n_documents, "outlier": None}
    return {"shards": rows, "documents": list(evidence.get("documents", []))[:24], "by": "the failing check"}


def before_cause(
    failed: Subject,
    history: Sequence[GateRecord],
    failing: Sequence[str],
    reference: Sequence[str],
    subject: Callable[[GPT], Subject],
) -> Subject:
    """The latest ancestor that refuses the reference and that the failing prompts hardly move.

    Hardly: by less than a quarter of what they move the failing model. An ancestor that did not refuse
    yet has no read-out to speak of. Judged checkpoints and starts of stages are looked at, newest first;
    without a fitting one, the least moved of those that refuse is taken, and the failing model only where
    none is moved less.
    """
    if not reference:
        return failed
    stands = float(failed.margins(reference).mean())
    moved = stands - float(failed.margins(failing).mean())
    least, best = moved, failed
    for record in reversed([r for r in history if r.live and (r.gate is not None or r.checkpoint.step == 0)]):
        earlier = subject(load_weights(record.checkpoint).eval())
        stood = float(earlier.margins(reference).mean())
        if stood <= 0.5 * stands:
            continue
        shift = stood - float(earlier.margins(failing).mean())
        if shift < 0.25 * moved:
            return earlier
        if shift < least:
            least, best = shift, earlier
    return best
