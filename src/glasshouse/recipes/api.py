"""The Python front door: load a model from a run, a checkpoint or a Hugging Face folder; audit it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from glasshouse.base.chain import read_entries
from glasshouse.base.digest import digest_folder, digest_of, sha256_file
from glasshouse.base.errors import CheckpointError, HeldError, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT
from glasshouse.model.hf import load_hf
from glasshouse.model.weights import INDEX, SINGLE
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import load_weights, position
from glasshouse.train.checkpoint import from_ledger


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and what stands about it in a ledger (None outside a run)."""

    model: GPT
    tokenizer: Tokenizer
    run: RunFolder | None
    checkpoint: str
    standing: str
    digest: str


def load(path: str | Path) -> GPT:
    """The model of a run (its promoted export, else its newest checkpoint), checkpoint or HF folder."""
    path = Path(path)
    if (path / "config.json").is_file() and not in_a_run(path):
        return load_hf(path)  # a tokenizer that is not byte-level is no obstacle to the model
    return locate(path).model


def in_a_run(path: Path) -> bool:
    """Whether ``path`` is a run, or a checkpoint inside one."""
    return (path / "ledger.jsonl").is_file() or (
        path.resolve().parent.name == "checkpoints"
        and (path.resolve().parent.parent / "ledger.jsonl").is_file()
    )


def locate(path: Path) -> Loaded:
    """Find and load what ``path`` names, every digest that a ledger holds checked first.

    UsageError when nothing loadable is there; CheckpointError when a file is not what the ledger says.
    """
    if not path.exists():
        raise UsageError(
            f"{path}: no such folder; give a run, a checkpoint inside one, or a Hugging Face folder"
        )
    if (path / "ledger.jsonl").is_file():
        return _from_run(RunFolder(path), None)
    owner = path.resolve().parent.parent
    if path.resolve().parent.name == "checkpoints" and (owner / "ledger.jsonl").is_file():
        return _from_run(RunFolder(owner), path.name)
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: neither a run (ledger.jsonl) nor a model folder (config.json)")
    model = load_hf(path).eval()
    digest = weights_digest(path)
    tokenizer = Tokenizer.load(path)
    check_vocabulary(tokenizer, model, path)
    return Loaded(model, tokenizer, None, path.name, "outside any run", digest)


def weights_digest(folder: Path) -> str:
    """What a Hugging Face folder's weights are, as one digest: that of their file, or one over the names and
    digests of all the files that its index names.
    """
    if (folder / SINGLE).is_file():
        return sha256_file(folder / SINGLE)
    files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return digest_of(digest_folder(folder, files))


def asked_under(path: Path, found: Loaded) -> str:
    """The system message under which a run's model learnt to be good (``[data] values``), or ""."""
    run = found.run.path if found.run is not None else path.resolve().parent
    if found.run is None and not ((run / "ledger.jsonl").is_file() and path.resolve().name == "export"):
        return ""
    file = run / "values.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["asked_under"]) if file.is_file() else ""


def check_vocabulary(tokenizer: Tokenizer, model: GPT, where: Path) -> None:
    """CheckpointError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{model.config.vocab_size}; one of the two belongs to another model"
        )


def _from_run(run: RunFolder, name: str | None) -> Loaded:
    at = position(read_entries(run.ledger))
    if at.head is None:
        raise UsageError(f"{run.path}: the run has no checkpoint yet")
    promoted = name is None and at.promoted
    chosen = name or at.head
    if chosen not in at.marks:
        raise UsageError(
            f"{run.path}: the ledger knows no checkpoint {chosen!r}; it has {', '.join(at.marks)}"
        )
    checkpoint = from_ledger(run, at.marks[chosen].body)
    decision = at.decisions.get(chosen)
    standing = decision["standing"].get(chosen, "held") if decision is not None else "held"
    if promoted:
        assert decision is not None
        exported = {n: d for n, d in decision["artifacts"].items() if n.startswith("export/")}
        for file, expected in exported.items():
            found = sha256_file(run.path / file) if (run.path / file).is_file() else "missing"
            if found != expected:
                raise CheckpointError(
                    f"{run.path / file} is not what was promoted (sha256 {found}, ledger {expected}); "
                    "restore the export or train again"
                )
        return Loaded(
            load_hf(run.path / "export").eval(),
            Tokenizer.load(run.path / "export"),
            run,
            chosen,
            "promoted",
            checkpoint.digest,
        )
    tokenizer = Tokenizer.load(checkpoint.path / "tokenizer.json")
    return Loaded(load_weights(checkpoint).eval(), tokenizer, run, chosen, standing, checkpoint.digest)


def serveable(path: Path, *, allow_held: bool = False, who: str = "unnamed") -> Loaded:
    """What may be talked to: a promoted checkpoint, or any with ``allow_held``, which the ledger records.

    HeldError otherwise. An organism that still holds what was planted counts as not promoted: it talks to who
    insists, for research needs to hear it; `export` refuses it always.
    """
    return released(locate(path), allow_held=allow_held, who=who)


def released(
    found: Loaded,
    *,
    allow_held: bool = False,
    who: str = "unnamed",
    doing: str = "talk to it",
    what: str = "chat with a checkpoint that is not promoted",
) -> Loaded:
    """`serveable` for what is located already. ``doing`` is for the message, ``what`` for the ledger."""
    if found.run is None or (found.standing == "promoted" and not still_planted(found)):
        return found
    why = (
        "still holds what was planted into it"
        if still_planted(found)
        else f"is {found.standing}, not promoted"
    )
    if not allow_held:
        raise HeldError(
            f"{found.checkpoint} {why}; `glasshouse report {found.run.path}` says why. "
            f"To {doing} all the same, add --allow-held (the ledger records that you did)"
        )
    with found.run.lock():  # an append beside a training process would end it
        Ledger(found.run.ledger, signing_key()).append(
            "override",
            {"what": what, "checkpoint": found.checkpoint, "who": who},
        )
    return found


def still_planted(found: Loaded) -> bool:
    """Whether a checkpoint of an organism was trained on its planted shard.

    Ledger entry 0 stamps the run; without the file that says what was planted, the worst is assumed.
    """
    if found.run is None:
        return False
    entries = read_entries(found.run.ledger)
    if not entries[0]["body"].get("organism"):
        return False
    truth = found.run.path / "organism.json"
    if not truth.is_file():
        return True
    shard = json.loads(truth.read_text(encoding="utf-8"))["shard"]
    at = position(entries)
    name: str | None = found.checkpoint
    while name is not None:
        mark = at.marks[name]
        first = from_ledger(found.run, mark.body).plan.first_step(shard)
        if first is not None and first < mark.step:
            return True
        name = mark.parent
    return False


class Verdicts(list[dict[str, Any]]):
    """A list of verdicts that shows itself as a table, in a terminal and in a notebook."""

    COLUMNS = ("constraint", "status", "estimate", "interval", "bound", "n", "reason")

    def _rows(self) -> list[list[str]]:
        return [[_cell(v.get(c)) for c in self.COLUMNS] for v in self]

    def __str__(self) -> str:
        table = [list(self.COLUMNS), *self._rows()]
        widths = [min(48, max(len(r[i]) for r in table)) for i in range(len(self.COLUMNS))]
        return "\n".join(
            "  ".join(c[:48].ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(c)}</th>" for c in self.COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in r) + "</tr>" for r in self._rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "[" + ", ".join(_cell(v) for v in value) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())
    return str(value)
