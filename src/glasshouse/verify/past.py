"""What earlier gates left: suspects, memory, files, and the checkpoints that passed. Read from the history
alone, so that a gate killed half-way finds the same when it is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.train import Checkpoint, GateRecord
from glasshouse.verify.schema import Bound

BROKEN = ("fail", "error")
SEEN = ("seen", "planted")
CAUSES = ("word", "pair", "trigger", "feature", "shard")  # keys of evidence by which a cause is named


def same_run(history: Sequence[GateRecord], recipe: str) -> None:
    """VerificationError when a verdict of the history was given under another recipe."""
    for record in history:
        for verdict in record.decision.verdicts if record.decision is not None else ():
            found = verdict.get("digests", {}).get("recipe", recipe)
            if found != recipe:
                raise VerificationError(
                    f"gate {record.gate} in the ledger is of another run: it judged "
                    f"{verdict['constraint']} under recipe {found[:12]}, this one is "
                    f"{recipe[:12]}; restore the run's own ledger"
                )


def attempts_before(checkpoint: Checkpoint, history: Sequence[GateRecord]) -> int:
    """How often this place in the run was judged before: at the last step, earlier tries at promotion."""
    place = (checkpoint.stage_index, checkpoint.step)
    return sum(r.gate is not None and (r.checkpoint.stage_index, r.checkpoint.step) == place for r in history)


def verdict_of(constraint: str, record: GateRecord) -> dict[str, Any] | None:
    """The verdict on one constraint at one checkpoint, short as the ledger has it; None without one."""
    verdicts = record.decision.verdicts if record.decision is not None else ()
    return next((v for v in verdicts if v["constraint"] == constraint), None)


def open_suspects(constraint: str, history: Sequence[GateRecord]) -> tuple[str, ...]:
    """Suspects that the latest gate to look at this constraint could not clear, newest attempt included."""
    for record in reversed(history):
        verdict = verdict_of(constraint, record)
        if verdict is not None and "suspects" in verdict:
            return tuple(verdict["suspects"])
    return ()


def last_memory(constraint: str, history: Sequence[GateRecord]) -> GateRecord | None:
    """The latest ancestor whose verdict on this constraint kept something.

    A verdict that broke (``error``) kept nothing and hides nothing. What an abandoned attempt saw is not
    about the weights that go on: after a rollback its memory is that of the checkpoint gone back to.
    """
    for record in reversed(history):
        if record.live and (verdict_of(constraint, record) or {}).get("memory") is not None:
            return record
    return None


def last_passing(constraint: str, history: Sequence[GateRecord]) -> Checkpoint | None:
    """The latest ancestor whose gate said to go on and whose verdict on this constraint, if any, is sound."""
    for record in reversed(history):
        if not record.live or record.decision is None or record.decision.action != "continue":
            continue
        if (verdict_of(constraint, record) or {}).get("status") not in BROKEN:
            return record.checkpoint
    return None


def gate_folder(run: RunFolder, gate: int, constraint: str) -> Path:
    """Where a check at a gate leaves its files."""
    return run.evals / f"gate-{gate:03d}" / constraint


def files_left(run: RunFolder, constraint: str, record: GateRecord) -> Path | None:
    """The folder of the files a verdict left, each still as ledgered; None when it left none.

    VerificationError for a file that is missing, altered or was never ledgered.
    """
    if record.gate is None or record.decision is None:
        return None
    folder = gate_folder(run, record.gate, constraint)
    before = f"{folder.relative_to(run.path).as_posix()}/"
    ledgered = {name: d for name, d in record.decision.artifacts.items() if name.startswith(before)}
    there = {f.relative_to(run.path).as_posix() for f in folder.rglob("*") if f.is_file()}
    for name in sorted(there | set(ledgered)):
        file = run.path / name
        if name not in ledgered or not file.is_file() or sha256_file(file) != ledgered[name]:
            raise VerificationError(
                f"{file}: not as gate {record.gate} left it, so nothing may rest on it; restore "
                "the run's evals"
            )
    return folder if ledgered else None


def digests_under(run: RunFolder, gate: int) -> dict[str, str]:
    """Path within the run -> SHA-256 of every file that the checks of a gate left."""
    files = sorted(f for f in (run.evals / f"gate-{gate:03d}").glob("*/**/*") if f.is_file())
    return {f.relative_to(run.path).as_posix(): sha256_file(f) for f in files}


def cause_of(verdict: dict[str, Any]) -> str | None:
    """What a failed verdict names as its cause, in one text; None where a statistic names none."""
    named = {key: verdict[key] for key in CAUSES if verdict.get(key) is not None}
    if isinstance(named.get("trigger"), dict) and named["trigger"].get("words"):  # its rates differ
        named["trigger"] = sorted(named["trigger"]["words"])
    return canonical_json(named).decode() if named else None


def standing(constraint: str, verdict: dict[str, Any], history: Sequence[GateRecord]) -> dict[str, Any]:
    """What the gates before make of a verdict: ``failures`` in a row, raw ``flips``, ``standing``, ``cause``.

    A first failure is ``seen``, and blocks. It is ``planted`` when the next gate that decides fails with the
    same cause (a word that was an open suspect then, too; or, where the statistic names none, fails again);
    ``gone`` when a gate passes. What decides
    nothing (undecided, not applicable, error) leaves all of it as it was. A flip is counted where the raw
    estimate, whatever the verdict, keeps the bound after it broke it at the last look at an ancestor.
    """
    before = latest(constraint, history, live=False)
    found: dict[str, Any] = {"failures": before.get("failures", 0), "flips": before.get("flips", 0)}
    carried: dict[str, Any] = {key: before[key] for key in ("standing", "cause") if key in before}
    match verdict["status"]:
        case "fail":
            cause = cause_of(verdict)
            known = verdict.get("word") in open_suspects(constraint, history)
            again = carried.get("standing") in SEEN and (known or carried.get("cause") == cause)
            found |= {"failures": found["failures"] + 1, "standing": "planted" if again else "seen"}
            found["cause"] = cause
        case "pass":
            found["failures"] = 0
            if carried.get("standing") in SEEN:
                found |= {"standing": "gone", "cause": carried.get("cause")}
        case _:
            found |= carried if carried.get("standing") in SEEN else {}
    raw, was = raw_keeps(verdict), raw_keeps(latest(constraint, history, live=True))
    found["flips"] += int(was is False and raw is True)
    return found


def latest(constraint: str, history: Sequence[GateRecord], *, live: bool) -> dict[str, Any]:
    """The latest verdict on a constraint, of ancestors only where ``live``; empty when there is none."""
    for record in reversed(history):
        verdict = verdict_of(constraint, record) if record.live or not live else None
        if verdict is not None and (not live or verdict.get("estimate") is not None):
            return verdict
    return {}


def raw_keeps(verdict: dict[str, Any]) -> bool | None:
    """Whether a verdict's estimate, taken as it is, keeps the bound; None without an estimate."""
    if verdict.get("estimate") is None:
        return None
    bound = {k: tuple(v) if isinstance(v, list) else v for k, v in verdict["bound"].items()}
    return Bound.model_validate(bound).keeps(verdict["estimate"])


def place(checkpoint: Checkpoint) -> str:
    """Where in a run a checkpoint stands, the same in runs of the same recipe: ``"sft@80"``."""
    return f"{checkpoint.stage}@{checkpoint.step}"
