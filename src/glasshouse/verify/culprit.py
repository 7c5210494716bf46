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
    """Find the data behind the first failure that shows prompts, and where to go back to.

    ``model`` fails, ``subject`` makes a model ready to be asked; ``quarantine`` is the most
    shards to drop, ``repairs`` what each constraint wants done instead.
    """
    shown = next((v for v in named if v["evidence"].get("failing_prompts")), None)
    if shown is None:
        return Decision("stop", f"{reason}; the failure shows no prompts to trace, so a person must look")
    failing, reference = shown["evidence"]["failing_prompts"], shown["evidence"].get("reference_prompts", [])
    before = before_cause(subject(model), history, failing, reference, subject)
    ranking = trace(before, shards, checkpoint.plan, checkpoint.step, failing, seed)
    dropped = to_quarantine(ranking, quarantine)
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
