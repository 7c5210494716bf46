"""Re-check a run's ledger and the files it names, trusting nothing but what comes from outside the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from glasshouse.base.chain import GENESIS, line_digest, read_chain, split_lines
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import UsageError
from glasshouse.base.keys import load_public, public_hex

# Enough digits that nobody finds another chain with the same beginning by trying.
MIN_HEAD_DIGITS = 16


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found. `ok` is True only if `problems` is empty.

    `problems` name the line or file that is wrong; `unchecked` says what could not be checked, and why.
    """

    ok: bool
    problems: list[str]
    unchecked: list[str]
    n_entries: int
    head: str
    public_key: str | None
    complete: bool  # the head given is the last entry's
    author: bool  # the signatures are by the key given

    @property
    def summary(self) -> str:
        """One sentence that claims no more than was checked."""
        if not self.ok:
            return f"NOT intact: {self.problems[0]}"
        known = {"completeness": self.complete, "author": self.author}
        missing = [word for word in known if not known[word]]
        if not missing:
            return "self-consistent; complete up to the head given, and signed by the key given"
        return f"self-consistent; {' and '.join(missing)} unverified"


def verify_ledger(
    run_path: str | Path, head: str | None = None, key: str | Path | Ed25519PublicKey | None = None
) -> VerifyResult:
    """Check chain, signatures and the digests of every artefact that entries name in `body["artifacts"]`.

    `run_path` is a run folder or a ledger file. `head` (from elsewhere: 64 hex digits, or at least the
    first 16) proves that no tail is missing; `key` (public key, a file with it, or its 64 hex digits)
    proves who signed. Raises `UsageError` if there is no ledger or `head` is malformed, `LedgerError` if
    `key` cannot be read; everything else is reported in the result.
    """
    path = Path(run_path)
    path = path / "ledger.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"no ledger at {path}; name a run folder or its ledger.jsonl")
    if head is not None and not re.fullmatch(rf"[0-9a-f]{{{MIN_HEAD_DIGITS},64}}", head):
        raise UsageError(f"head must be {MIN_HEAD_DIGITS} to 64 lower-case hex digits, got '{head}'")
    expected_key = None if key is None else _key_hex(key)

    lines, torn = split_lines(path.read_bytes())
    entries, problem = read_chain(lines)
    problems, unchecked = [], []
    if problem:
        problems.append(problem)
        if len(lines) > len(entries) + 1:
            unchecked.append(f"lines {len(entries) + 2} to {len(lines)}: they follow a line that is wrong")
    if torn:
        problems.append(
            f"line {len(lines) + 1} is incomplete: torn by a crash (resuming recovers it) or changed"
        )
    if not lines and not torn:
        problems.append("the ledger is empty")

    public = str(entries[0]["body"]["public_key"]) if entries else None
    author = expected_key is not None and expected_key == public
    if expected_key is not None and not author:
        problems.append(f"line 1 names the key {public}, but the key given is {expected_key}")
    if expected_key is None:
        unchecked.append("author: without --key, anyone may have signed this chain anew")

    complete = _check_head(head, [line_digest(line) for line in lines[: len(entries)]], problems, unchecked)
    _check_artifacts(path.parent, entries, problems, unchecked)
    return VerifyResult(
        ok=not problems,
        problems=problems,
        unchecked=unchecked,
        n_entries=len(entries),
        head=line_digest(lines[len(entries) - 1]) if entries else GENESIS,
        public_key=public,
        complete=complete and not problems,
        author=author,
    )


def _key_hex(key: str | Path | Ed25519PublicKey) -> str:
    if isinstance(key, Ed25519PublicKey):
        return public_hex(key)
    if re.fullmatch("[0-9a-f]{64}", str(key)):
        return str(key)
    return public_hex(load_public(key))


def _check_head(head: str | None, digests: list[str], problems: list[str], unchecked: list[str]) -> bool:
    if head is None:
        unchecked.append("completeness: without --head, a deleted tail does not show")
        return False
    places = [number for number, digest in enumerate(digests, start=1) if digest.startswith(head)]
    if not places:
        problems.append(f"no line has the head {head}: lines were deleted, or the chain was signed anew")
        return False
    if places[0] < len(digests):
        unchecked.append(f"completeness after line {places[0]}: the head given is older than the last line")
        return False
    return True


def _check_artifacts(
    root: Path, entries: list[dict[str, Any]], problems: list[str], unchecked: list[str]
) -> None:
    """Compare each file with the last digest that an entry gives for it, unless a later entry deleted it."""
    wanted: dict[str, tuple[str, int]] = {}
    for number, entry in enumerate(entries, start=1):
        artifacts, deleted = entry["body"].get("artifacts", {}), entry["body"].get("deleted", [])
        if not isinstance(artifacts, dict) or not isinstance(deleted, list):
            problems.append(f"line {number}: 'artifacts' must be a table and 'deleted' a list of paths")
            continue
        for gone in deleted:
            for name in [n for n in wanted if n == gone or n.startswith(f"{gone}/")]:
                unchecked.append(f"{name} (line {wanted.pop(name)[1]}): deleted, says line {number}")
        for name, digest in artifacts.items():
            if name in wanted and wanted[name][0] != digest:
                unchecked.append(f"{name} as of line {wanted[name][1]}: replaced, says line {number}")
            wanted[name] = (digest, number)
    for name, (digest, number) in wanted.items():
        if (reason := _differs(root, name, digest)) is not None:
            problems.append(f"{name} (line {number}): {reason}")
    found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    unnamed = [n for n in found if n not in wanted and not n.startswith("ledger.jsonl") and n != "run.lock"]
    if unnamed:
        more = f" and {len(unnamed) - 5} more" if len(unnamed) > 5 else ""
        unchecked.append(f"files that no entry names: {', '.join(unnamed[:5])}{more}")


def _differs(root: Path, name: str, digest: Any) -> str | None:
    """Return why a file is not the one the ledger names, or None if it is."""
    pure = PurePosixPath(name)
    # A signed ledger from a stranger must not make us read files outside its own folder.
    if pure.is_absolute() or ".." in pure.parts or not (root / pure).resolve().is_relative_to(root.resolve()):
        return "its path leads out of the run folder; not read"
    if not (root / pure).is_file():
        return "missing"
    try:
        found = sha256_file(root / pure)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found == digest:
        return None
    return f"changed: its SHA-256 is {found[:16]}..., the ledger says {str(digest)[:16]}..."
