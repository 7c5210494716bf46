"""Make the envelope that `update_outlier` compares with: what updates of clean training runs are like.

A gated run is measured from gate to gate, over the steps between them (``"sft@80>sft@160"``), and so is the
run that will be judged by the envelope. Models that no gate of ours has seen, such as fine-tuned folders, are
measured over their whole training, from the one model that all of them began with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from glasshouse.base.atomic import write_json
from glasshouse.base.chain import read_entries
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import UsageError
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.recipes.api import Loaded, locate
from glasshouse.train import load_weights, position
from glasshouse.train.checkpoint import from_ledger
from glasshouse.train.fold import Position
from glasshouse.verify.fdr import twins_needed
from glasshouse.verify.past import place
from glasshouse.verify.weights import ANY, Measurement, envelope, measure

ACTED = ("rollback", "stop")  # what a gate asks for where data may not be clean, beside holding a failure


@dataclass(frozen=True)
class Twin:
    """One clean twin: the digest of its last checkpoint, and moment -> what its update was like."""

    digest: str
    moments: dict[str, Measurement]


@dataclass(frozen=True)
class Envelope:
    """An envelope that was written. ``moments`` are what it can judge, ``left_out`` those that a twin lacks.

    ``fitted`` twins say what is normal, ``ranked`` ones are what an update is ranked among; one more is the
    control.
    """

    path: Path
    sha256: str
    fitted: int
    ranked: int
    moments: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def level(self) -> float:
        """The lowest `alpha` at which this many twins decide anything."""
        return 1 / (self.ranked + 1)

    @property
    def declaration(self) -> str:
        """The line of a constraint that declares it, for a file in the same folder."""
        return f'envelope = {{ path = {json.dumps(self.path.name)}, sha256 = "{self.sha256}" }}'

    def missing(self, alpha: float) -> int:
        """How many twins more it takes to decide at ``alpha``; 0: none."""
        return max(0, twins_needed(alpha) - self.ranked)


def make_envelope(
    twins: Sequence[str | Path], out: str | Path, *, before: str | Path | None = None, fit: int | None = None
) -> Envelope:
    """Measure clean ``twins`` and write their envelope to ``out``, which must not exist.

    ``twins`` are finished gated runs of one recipe; with ``before``, runs or model folders that were all
    trained from that model. They are dealt in the order given: a fifth (or ``fit``) says what is normal, the
    last is the control, the others are ranked. UsageError for what is no clean twin (something was planted in
    it, its gate held a failure, went back or stopped, it is given twice) or shares no measured steps with the
    others; VerificationError for too few twins, or of several architectures.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists, and envelopes are declared by their digest: name another file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder to write the envelope into")
    if not twins:
        raise UsageError("no clean twins are named: give finished runs, or model folders and --from MODEL")
    start = None if before is None else locate(Path(before))
    found = [_gated(Path(t)) if start is None else _tuned(Path(t), start) for t in twins]
    _require_different(twins, found)
    every = list(dict.fromkeys(m for t in found for m in t.moments))
    shared = [m for m in every if all(m in t.moments for t in found)]
    if not shared:
        raise UsageError(
            f"no update was measured in all {len(found)} runs: twins are runs of one recipe, gated at the "
            f"same steps, and {twins[0]} has {', '.join(found[0].moments)}"
        )
    made = envelope([{m: t.moments[m] for m in shared} for t in found], fit)
    write_json(out, made | {"made_of": [t.digest for t in found]})
    return Envelope(
        *(out, sha256_file(out), made["twins"]["fitted"], made["twins"]["ranked"]),
        tuple(shared),
        tuple(m for m in every if m not in shared),
    )


def _gated(path: Path) -> Twin:
    """A gated run, measured from every gate to the next one on the way to its last checkpoint."""
    run = RunFolder(path)
    if not run.ledger.is_file():
        raise UsageError(
            f"{path}: no run (it has no ledger.jsonl). For model folders, name the model that all of them "
            "were trained from: --from MODEL"
        )
    at = _clean(run)
    judged = [from_ledger(run, at.marks[n].body) for n in at.lineage() if n in at.decisions]
    moments: dict[str, Measurement] = {}
    last: GPT | None = None
    for earlier, later in pairwise(judged):
        before, last = last or load_weights(earlier), load_weights(later)
        moments[f"{place(earlier)}>{place(later)}"] = measure(before, last)
    if not moments:
        raise UsageError(f"{path}: it has {len(judged)} gates, and an update is measured between two")
    return Twin(judged[-1].digest, moments)


def _tuned(path: Path, start: Loaded) -> Twin:
    """A run or a model folder, measured from the model that it was trained from."""
    found = locate(path)
    if found.run is not None:
        _clean(found.run)
    if found.tokenizer.digest() != start.tokenizer.digest():
        raise UsageError(f"{path} has another tokenizer than {start.checkpoint}: it was not trained from it")
    if found.digest == start.digest:
        raise UsageError(f"{path} is the very model that the others were trained from")
    return Twin(found.digest, {ANY: measure(start.model, found.model)})


def _clean(run: RunFolder) -> Position:
    """Where a finished run stands. UsageError unless it may count as clean, as far as its ledger knows."""
    entries = read_entries(run.ledger)
    at = position(entries)
    if at.phase != "finished":
        raise UsageError(f"{run.path}: the run is not finished; a clean twin is a whole one")
    if entries[0]["body"].get("organism") and not _is_twin(run):
        raise UsageError(f"{run.path}: something was planted in this run, so it is no clean twin")
    for body in at.decisions.values():
        failed = any(v["status"] == "fail" for v in body["verdicts"])
        if body["asked"] in ACTED or (failed and body["asked"] == "hold"):
            raise UsageError(
                f"{run.path}: gate {body['gate']} asked for a {body['asked']}, so its data are not known to "
                f"be clean: {body['reason']}"
            )
    return at


def _is_twin(run: RunFolder) -> bool:
    """Whether the truth about an organism's run says that it is the twin. Without that file: no."""
    truth = run.path / "organism.json"
    return truth.is_file() and json.loads(truth.read_text("utf-8")).get("twin") is True


def _require_different(names: Sequence[str | Path], twins: Sequence[Twin]) -> None:
    """UsageError when a twin counts twice: it would be ranked among itself."""
    seen: dict[str, str | Path] = {}
    for name, twin in zip(names, twins, strict=True):
        if twin.digest in seen:
            raise UsageError(f"{name} and {seen[twin.digest]} are the same model, which may count once only")
        seen[twin.digest] = name
