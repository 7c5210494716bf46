"""Read a run folder as files, without torch and without trusting any of it.

Everything but the folder itself may be missing: a run in progress has no story, a run without gates no
verdicts. A file that is there and cannot be read is a `DataError` naming file and line; a value of the
wrong type inside a readable file is treated as absent, so that a run written by another version still
opens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasshouse.base.chain import read_chain, split_lines
from glasshouse.base.errors import DataError
from glasshouse.base.ledger import VerifyResult, verify_ledger
from glasshouse.base.run import RunFolder


def num(value: object) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        known = float(value)
    except OverflowError:
        return None
    return known if math.isfinite(known) else None


def words(value: object) -> str:
    """`value` as a string; numbers are spelled, anything else is empty."""
    if isinstance(value, str):
        return value
    known = num(value)
    return "" if known is None else str(value) if abs(known) < 1e15 else f"{known:g}"


def table(value: object) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[dict[str, Any]]:
    """The objects in `value` if it is a list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Gate:
    """One visit of the gate: the checkpoint it judged, its verdicts and what it decided."""

    index: int
    checkpoint: str
    stage: str
    update: float | None
    action: str
    reason: str
    to_checkpoint: str
    drop_shards: tuple[str, ...]
    verdicts: tuple[dict[str, Any], ...]
    densify: int = 1  # the rest of the stage is gated so many times as often
    repair: dict[str, Any] = field(default_factory=dict)  # what training does about it from a rollback on


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read. Lists are in the order of the files."""

    path: Path
    recipe: dict[str, Any]
    entries: tuple[dict[str, Any], ...]
    check: VerifyResult | None
    metrics: tuple[dict[str, Any], ...]
    gates: tuple[Gate, ...]
    attributions: tuple[dict[str, Any], ...]
    lineage: dict[str, Any]
    story: dict[str, Any]
    samples: tuple[dict[str, Any], ...]
    planted: dict[str, Any]
    manifests: dict[str, dict[str, Any]]
    parameters: int | None
    notes: tuple[str, ...] = field(default=())

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Bodies of the ledger entries of one kind, in order."""
        return [table(e.get("body")) for e in self.entries if e.get("kind") == kind]

    def promoted(self) -> list[str]:
        """Names of promoted checkpoints, in order, by promotion, decision or finish, whichever says so."""
        found: dict[str, None] = {}
        for entry in self.entries:
            body, kind = table(entry.get("body")), entry.get("kind")
            if kind == "promotion" or (kind == "decision" and body.get("action") == "promote"):
                found[words(body.get("checkpoint"))] = None
            elif kind == "finish" and words(body.get("promoted")):
                found[words(body["promoted"])] = None
        return [name for name in found if name]

    def standings(self) -> dict[str, tuple[str, str]]:
        """Checkpoint name to its latest (standing, reason)."""
        found: dict[str, tuple[str, str]] = {}
        for entry in self.entries:
            body, kind = table(entry.get("body")), entry.get("kind")
            if kind == "decision":
                for name, standing in table(body.get("standing")).items():
                    found[name] = (words(standing), words(body.get("reason")))
            elif kind == "standing":
                of = words(body.get("checkpoint"))
                found[of] = (words(body.get("standing")), words(body.get("reason")))
        for name in self.promoted():
            found[name] = ("promoted", found.get(name, ("", ""))[1])
        return found

    def updates(self) -> dict[str, float]:
        """Checkpoint name to the update at which it was saved."""
        known = {words(b.get("checkpoint")): num(b.get("update")) for b in self.of("checkpoint")}
        return {name: at for name, at in known.items() if at is not None}


def _load(path: Path) -> Any:
    """The JSON in `path`, or None when the file is absent."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}). Restore the file or remove it, then build again."
        ) from error


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of metrics.jsonl and notes for the reader. Raises DataError naming the line that is wrong.

    A last line without its newline that does not parse was torn by a crash: it is skipped, and a note says
    so.
    """
    if not path.is_file():
        return [], []
    lines = path.read_bytes().split(b"\n")
    out: list[dict[str, Any]] = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if i == len(lines):
                return out, [f"The last line of {path.name} (line {i}) is torn and was skipped."]
            raise DataError(
                f"{path}, line {i}: not valid JSON ({error}). Remove or restore that line."
            ) from error
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("kind"), str)
            or num(row.get("update")) is None
        ):
            raise DataError(
                f"{path}, line {i}: not a metrics row (an object with a text 'kind' and a number 'update')."
            )
        out.append(row)
    return out, []


def read_ledger(path: Path) -> tuple[list[dict[str, Any]], VerifyResult | None, list[str]]:
    """Entries up to the first that is not intact, what a check of the run found, and notes for the reader.

    Opening the file through `base.ledger.Ledger` would repair a torn tail, and a report must not write to a
    run.
    """
    if not path.is_file():
        return [], None, ["This run has no ledger: nothing on this page can be checked."]
    lines, _ = split_lines(path.read_bytes())
    entries, problem = read_chain(lines)
    notes = [f"The ledger's {problem}. What it says from there on is not shown."] if problem else []
    return entries, verify_ledger(path.parent), notes


def _gate_files(run: RunFolder) -> dict[int, tuple[str, dict[str, Any]]]:
    """Gate index to (path within the run, contents) of evals/gate-*/verdicts.json."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for path in sorted(run.evals.glob("gate-*/verdicts.json")):
        data = _load(path)
        if not isinstance(data, dict):
            raise DataError(f"{path}: not an object with gate, checkpoint and verdicts.")
        index = num(data.get("gate"))
        name = path.relative_to(run.path).as_posix()
        found[int(index) if index is not None else len(found)] = (name, data)
    return found


def _gates(run: RunFolder, entries: list[dict[str, Any]], updates: dict[str, float]) -> list[Gate]:
    """Gates in order: what was decided from the ledger, the evidence from evals/gate-*/verdicts.json.

    The ledger's own verdicts are shown instead of a file's where no ledger entry vouches for the file.
    """
    files = _gate_files(run)
    vouched: set[str] = set()
    decisions: dict[int, dict[str, Any]] = {}
    ledgered: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        body = table(entry.get("body"))
        vouched.update(table(body.get("artifacts")))
        index = num(body.get("gate"))
        if index is None:
            continue
        if entry.get("kind") == "decision":
            decisions[int(index)] = body
            if rows(body.get("verdicts")):
                ledgered[int(index)] = rows(body.get("verdicts"))
        elif entry.get("kind") == "verdict" and isinstance(body.get("verdict"), dict):
            ledgered.setdefault(int(index), []).append(body["verdict"])
            decisions.setdefault(int(index), {"checkpoint": body.get("checkpoint")})
    out = []
    for number in sorted({*files, *decisions}):
        name, data = files.get(number, ("", {}))
        decision = decisions.get(number, {})
        checkpoint = words(decision.get("checkpoint")) or words(data.get("checkpoint"))
        said = number in ledgered and name not in vouched
        update = updates.get(checkpoint)
        dropped = decision.get("drop_shards") or data.get("drop_shards")
        out.append(
            Gate(
                index=number,
                checkpoint=checkpoint,
                stage=words(data.get("stage")),
                update=num(data.get("update")) if update is None else update,
                action=words(decision.get("action")) or words(data.get("decision")),
                reason=words(decision.get("reason")) or words(data.get("reason")),
                to_checkpoint=words(decision.get("to_checkpoint")) or words(data.get("to_checkpoint")),
                drop_shards=tuple(words(s) for s in dropped) if isinstance(dropped, list) else (),
                verdicts=tuple(ledgered[number] if said else rows(data.get("verdicts"))),
                densify=int(num(decision.get("densify")) or 1),
                repair=table(decision.get("repair")),
            )
        )
    return out


def _parameters(run: RunFolder, entries: list[dict[str, Any]]) -> int | None:
    """Number of weights: the ledger's word, else counted in the newest checkpoint's safetensors header."""
    for entry in entries:
        for key in ("parameters", "n_parameters"):
            known = num(table(entry.get("body")).get(key))
            if known is not None:
                return int(known)
    files = sorted(run.checkpoints.glob("*/model.safetensors"))
    if not files:
        return None
    with files[-1].open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = file.read(size) if size < 50_000_000 else b""
    try:
        tensors = table(json.loads(head))
    except ValueError:
        return None
    shapes = [table(t).get("shape") for name, t in tensors.items() if name != "__metadata__"]
    return sum(math.prod(s) for s in shapes if isinstance(s, list) and all(isinstance(d, int) for d in s))


def read_run(path: Path) -> RunRecord:
    """Everything the report shows, from the run folder at `path`; DataError when there is no such folder."""
    run = RunFolder(path)
    if not path.is_dir():
        raise DataError(
            f"{path}: no such run folder. Give the folder that holds recipe.json and ledger.jsonl."
        )
    if not any(p.exists() for p in (run.recipe, run.ledger, run.metrics, run.evals)):
        raise DataError(
            f"{path}: not a run folder (no recipe.json, ledger.jsonl, metrics.jsonl or evals/ in it)."
        )
    entries, check, notes = read_ledger(run.ledger)
    metrics, torn = read_metrics(run.metrics)
    bodies = [table(e.get("body")) for e in entries if e.get("kind") == "checkpoint"]
    updates = {words(b.get("checkpoint")): at for b in bodies if (at := num(b.get("update"))) is not None}
    data = sorted(run.data.rglob("manifest.json")) if run.data.is_dir() else []
    attributions = [table(_load(p)) for p in sorted(run.evals.glob("attribution-*.json"))]
    return RunRecord(
        path=path,
        recipe=table(_load(run.recipe)),
        entries=tuple(entries),
        check=check,
        metrics=tuple(metrics),
        gates=tuple(_gates(run, entries, updates)),
        attributions=tuple(attributions),
        lineage=table(_load(run.evals / "lineage.json")),
        story=table(_load(run.evals / "story.json")),
        samples=tuple(rows(_load(run.evals / "samples.json"))),
        planted=table(_load(run.evals / "planted.json")),
        manifests={p.parent.relative_to(run.data).as_posix(): table(_load(p)) for p in data},
        parameters=_parameters(run, entries),
        notes=tuple(notes + torn),
    )
