"""Weight constraints: what an update did to every matrix, against what clean twins' updates did.

A twin is a training run of the same architecture, over the same steps, on data known to be clean. Its update
is measured in logarithms: per matrix the norm and the two largest singular values, relative to the weights,
and the stable rank; per embedding row how far it moved. Where all twins began from one checkpoint, a row's
move is measured against the twins' mean move: what remains is what their data does not explain.

The envelope is a JSON file made once (`envelope`, `write_envelope`) and declared by its digest. `conformal`
says what the level means. One departure is taken over all matrices and rows, the largest, and not an average
of e-values: an update that is odd in one matrix of twenty would then need twenty times the evidence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.atomic import write_json
from glasshouse.base.digest import sha256_bytes, sha256_file
from glasshouse.base.errors import RecipeError, VerificationError
from glasshouse.model import GPT
from glasshouse.verify.conformal import Normal, dealt, farthest, normal, p_value
from glasshouse.verify.examination import Examination, Finding, control_row
from glasshouse.verify.fdr import at_level, calibrate_mixture, twins_needed
from glasshouse.verify.schema import Constraint, DeclaredFile

ANY = "*"  # the moment of an envelope that is meant for any update
TINY = 1e-12  # below any move that fp32 training makes
MOST_NUMBERS = 2_000_000  # entries of an embedding up to which the twins' mean move is kept row by row
SHOWN = 16  # matrices and tokens in the evidence
WITHOUT = (
    "no envelope is declared, so there is nothing to compare an update with. `glasshouse envelope RUN... "
    "--out FILE` makes one of clean runs; declare it as `envelope` = { path, sha256 }, or name it: --envelope"
)


@dataclass(frozen=True)
class Measurement:
    """One update. ``quantities`` are logarithms by name; ``rows`` [vocab, d_model] is the embedding's move,
    or [vocab, 1] how far each row moved where the embedding is larger than `MOST_NUMBERS`; ``start`` the
    digest of the embedding before it; ``shapes`` those of all parameters."""

    quantities: dict[str, float]
    rows: np.ndarray
    start: str
    shapes: dict[str, list[int]]


@torch.no_grad()
def measure(before: GPT, after: GPT) -> Measurement:
    """What happened between two checkpoints of one run. VerificationError for NaN or other shapes."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    shapes = {name: list(p.shape) for name, p in new.items()}
    if shapes != {name: list(p.shape) for name, p in old.items()}:
        raise VerificationError("the two checkpoints differ in their parameters' names or shapes")
    quantities: dict[str, float] = {}
    for name, p in new.items():
        was = old[name].double()
        move = p.double() - was
        if not bool(torch.isfinite(move).all()):
            raise VerificationError(f"{name} holds NaN or infinities, so its update cannot be measured")
        size = max(float(was.norm()), TINY)
        if p.ndim < 2:
            quantities[f"{name} norm"] = _log(float(move.norm()) / size)
            continue
        top = singular_values(move.flatten(1))
        energy = float(move.square().sum())
        quantities[f"{name} norm"] = _log(math.sqrt(energy) / size)
        quantities[f"{name} sigma_1"] = _log(float(top[0]) / size)
        quantities[f"{name} sigma_2"] = _log(float(top[1]) / size) if len(top) > 1 else _log(0)
        quantities[f"{name} stable_rank"] = _log(energy / max(float(top[0]) ** 2, TINY**2))
    table = before.embed.weight.detach().float().contiguous()
    rows = (after.embed.weight.detach().float() - table).numpy().astype(np.float64)
    if rows.size > MOST_NUMBERS:
        rows = np.linalg.norm(rows, axis=1, keepdims=True)
    return Measurement(quantities, rows, sha256_bytes(table.numpy().tobytes()), shapes)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, largest first, from the Gram matrix of the shorter side: good for the largest."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def envelope(runs: Sequence[Mapping[str, Measurement]], fit: int | None = None) -> dict[str, Any]:
    """The envelope of clean twins' measurements, one mapping of moment -> measurement a twin.

    A moment names stage and step of both checkpoints, ``"sft@0>sft@80"``, or is ``"*"`` alone for one update
    of whatever steps. Twins are dealt
    in the order given (`conformal.dealt`): list them before looking. VerificationError when they are too few
    or do not measure the same.
    """
    fitted, ranked, held = dealt(len(runs), fit)
    moments = sorted(runs[0])
    shapes = runs[0][moments[0]].shapes
    for run in runs:
        if sorted(run) != moments or any(m.shapes != shapes for m in run.values()):
            raise VerificationError(
                "clean twins must be of one architecture and measured at the same moments"
            )
    made: dict[str, Any] = {}
    departures: dict[str, list[float]] = {}
    for moment in moments:
        made[moment] = _normal_row([run[moment] for run in runs], fitted)
        departures[moment] = [_departs(made[moment], run[moment]).worst for run in runs]
    worst = farthest(departures)
    return {
        "version": 1,
        "shapes": shapes,
        "moments": made,
        "twins": {"fitted": len(fitted), "ranked": len(ranked)},
        "worst": [float(worst[i]) for i in ranked],
        "held_out": float(worst[held]),
    }


def write_envelope(path: Path, runs: Sequence[Mapping[str, Measurement]], fit: int | None = None) -> str:
    """Write the envelope of ``runs`` and return the SHA-256 to declare."""
    write_json(path, envelope(runs, fit))
    return sha256_file(path)


def update_outlier(exam: Examination) -> Finding:
    """How far the update since the last passing checkpoint departs, as a share of the farthest clean twin.

    ``fail`` when it departs farther than the bound *and* its rank among the twins reaches the level. Gates
    share nothing: see `conformal`. A level that this many twins cannot reach leaves everything undecided.
    """
    if exam.around.before is None:
        return Finding(
            "not_applicable",
            reason="there is no earlier passing checkpoint to take the update from (an audit takes --before)",
        )
    declared = read_envelope(exam)
    moment = _moment(exam, declared)
    if moment is None:
        known = ", ".join(list(declared["moments"])[:8])
        return Finding(
            "undecided", reason=f"no clean twin was measured over {_asked(exam)}; the envelope has {known}"
        )
    measured = measure(exam.around.before(), exam.subject.model)
    if measured.shapes != declared["shapes"]:
        raise VerificationError(f"constraint {exam.constraint.id}: its envelope is of another architecture")
    found = _departs(declared["moments"][moment], measured)
    twins, level = declared["worst"], exam.run_level
    ratio, p = found.worst / max(twins), p_value(found.worst, twins)
    needed = twins_needed(level)
    reach = math.floor(level * (len(twins) + 1) + 1e-9) / (len(twins) + 1)  # the ranks that count as rare
    rare = p <= reach + 1e-12
    finding = Finding(
        "pass" if exam.constraint.bound.keeps(ratio) else "fail" if rare else "undecided",
        estimate=ratio,
        n=len(twins),
        e_fail=at_level(p, reach) if reach > 0 else calibrate_mixture(p),
        coverage={
            "share": 1.0,
            "scope": f"{len(found.names)} quantities of {len(measured.shapes)} parameters, "
            f"{len(found.rows)} embedding rows",
            "twins": declared["twins"],
            "row_moved_times": round(math.exp(min(max(twins) * found.row_spread, 50)), 2),
        },
        control=control_row(exam, max(0.0, declared["held_out"] / max(twins) - 1), 1),
        evidence=_evidence(exam, found, p, moment),
    )
    if len(twins) < needed:
        finding.status = "undecided"
        finding.reason = f"level {level:g} needs {needed} ranked clean twins; the envelope has {len(twins)}"
    elif finding.status == "undecided":
        finding.reason = f"outside the bound, but not rare among the clean twins (p = {p:.3f})"
    return finding


def read_envelope(exam: Examination) -> dict[str, Any]:
    """The declared envelope. VerificationError when it is missing, altered, or no envelope."""
    spec = exam.constraint.envelope
    if spec is None:
        raise VerificationError(f"constraint {exam.constraint.id}: {WITHOUT}")
    file = exam.folder / spec.path
    if not file.is_file() or sha256_file(file) != spec.sha256:
        raise VerificationError(f"{file}: missing, or not the envelope that was declared; restore it")
    return _read(file)


def declare_envelope(constraints: Sequence[Constraint], file: Path) -> tuple[Constraint, ...]:
    """The constraints with ``file`` declared, by its digest, as the envelope of those that have none.

    VerificationError when it is missing or no envelope; RecipeError when no constraint here has use for it.
    """
    if not file.is_file():
        raise VerificationError(f"{file}: no such envelope; `glasshouse envelope` makes one of clean runs")
    _read(file)
    spec = DeclaredFile(path=str(file.absolute()), sha256=sha256_file(file))
    use = [c.id for c in constraints if c.statistic == "update_outlier" and c.envelope is None]
    if not use:
        raise RecipeError(f"no constraint here lacks an envelope, so {file} would have no effect")
    return tuple(c.model_copy(update={"envelope": spec}) if c.id in use else c for c in constraints)


def require_envelopes(constraints: Sequence[Constraint]) -> None:
    """RecipeError where nothing could be checked, because every constraint lacks its envelope."""
    if constraints and all(c.statistic == "update_outlier" and c.envelope is None for c in constraints):
        raise RecipeError(f"constraint {constraints[0].id}: {WITHOUT}")


def _read(file: Path) -> dict[str, Any]:
    """An envelope's contents. VerificationError when the file holds something else."""
    try:
        found = json.loads(file.read_bytes())
        if found["version"] != 1 or not found["worst"] or min(found["worst"]) <= 0:
            raise ValueError("another version, or no ranked twin")
    except (ValueError, KeyError, TypeError) as problem:
        raise VerificationError(f"{file}: not an envelope of clean twins ({problem})") from problem
    return dict(found)


# -- departing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Departure:
    """Deviations of one update: ``z`` [quantity] either way, ``rows`` [vocab] upwards; the largest."""

    names: list[str]
    z: np.ndarray
    rows: np.ndarray
    row_spread: float

    @property
    def worst(self) -> float:
        return float(max(np.abs(self.z).max(), self.rows.max()))


def _normal_row(twins: Sequence[Measurement], fitted: range) -> dict[str, Any]:
    """What is normal at one moment, as it stands in the envelope."""
    names = sorted(twins[0].quantities)
    known = normal(np.array([[twins[i].quantities[name] for name in names] for i in fitted]))
    moves = np.array([twins[i].rows for i in fitted])
    whole = moves.shape[2] == twins[0].shapes["embed.weight"][1]
    together = len({t.start for t in twins}) == 1 and whole
    mean = np.round(moves.mean(0), 7) if together else None
    n = len(moves)
    # A twin that helped to make the mean lies nearer to it: from the others' mean it is n / (n - 1) as far.
    lengths = [_moved(m, mean) + (math.log(n / (n - 1)) if together else 0.0) for m in moves]
    rows = normal(np.array(lengths))
    return {
        "names": names,
        "centre": known.centre.tolist(),
        "spread": known.spread.tolist(),
        "row_centre": np.round(rows.centre, 6).tolist(),
        "row_spread": np.round(rows.spread, 6).tolist(),
        "start": twins[0].start if together else None,
        "mean_move": None if mean is None else mean.tolist(),
    }


def _moved(rows: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """log length [vocab] of each row's move [vocab, d_model], against ``mean`` where there is one.

    A thousandth of the usual length is added, so that a row that did not move is not infinitely unusual.
    """
    length = np.linalg.norm(rows - (0.0 if mean is None else mean), axis=1)
    return np.asarray(np.log(length + 1e-3 * np.median(length) + TINY))


def _departs(known: Mapping[str, Any], update: Measurement) -> _Departure:
    """How far one update departs from what is normal at its moment."""
    same = known["start"] is not None
    if same and update.start != known["start"]:
        raise VerificationError("the envelope's twins all began from another checkpoint than this update did")
    usual = Normal(np.array(known["centre"]), np.array(known["spread"]))
    rows = Normal(np.array(known["row_centre"]), np.array(known["row_spread"]))
    mean = np.array(known["mean_move"]) if same else None
    z = usual.z(np.array([update.quantities[name] for name in known["names"]]))
    moved = rows.z(_moved(update.rows, mean))
    return _Departure(known["names"], z, moved, float(np.median(rows.spread)))


def _evidence(exam: Examination, found: _Departure, p: float, moment: str) -> dict[str, Any]:
    """The matrices and the tokens that depart farthest."""
    text: Callable[[list[int]], str] = exam.subject.tokenizer.decode
    order = np.argsort(-np.abs(found.z), kind="stable")[:SHOWN]
    rows = np.argsort(-found.rows, kind="stable")[:SHOWN]
    return {
        "p": p,
        "moment": moment,
        "matrices": [{"name": found.names[i], "z": round(float(found.z[i]), 3)} for i in order],
        "tokens": [
            {"token": int(t), "text": text([int(t)]), "z": round(float(found.rows[t]), 3)} for t in rows
        ],
    }


def _asked(exam: Examination) -> str:
    return ">".join(exam.around.places) if exam.around.places else "an update of unknown steps"


def _moment(exam: Examination, declared: Mapping[str, Any]) -> str | None:
    """The envelope's moment for this update, None when no twin was measured over the same steps."""
    if ANY in declared["moments"]:
        return ANY
    asked = _asked(exam)
    return asked if asked in declared["moments"] else None


def _log(x: float) -> float:
    return math.log(max(x, TINY))
