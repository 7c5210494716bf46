"""The ledger's format: how lines are read, linked and signed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import sha256_bytes
from glasshouse.base.errors import GlasshouseError, LedgerError

GENESIS = "0" * 64
FIELDS = {"body", "kind", "prev", "seq", "sig", "time"}


def sign_entry(unsigned: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """Return the line of an entry: its canonical JSON with `sig` added, and a line end."""
    signature = base64.b64encode(key.sign(canonical_json(unsigned))).decode("ascii")
    return canonical_json({**unsigned, "sig": signature}) + b"\n"


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """Split a ledger file into its whole lines, line ends kept, and what follows the last (a torn line)."""
    *lines, torn = data.split(b"\n")  # not splitlines: it also splits at a carriage return
    return [line + b"\n" for line in lines], torn


def line_digest(line: bytes) -> str:
    """Return the SHA-256 of an entry's canonical JSON, given its line."""
    return sha256_bytes(line.removesuffix(b"\n"))


def read_chain(lines: list[bytes]) -> tuple[list[dict[str, Any]], str | None]:
    """Check lines as a chain; return the entries that hold and what is wrong with the first that does not.

    Checks that each line is canonical JSON with exactly the fields, in sequence, linked to the one before
    it, and signed by the key in entry 0.
    """
    entries: list[dict[str, Any]] = []
    public: Ed25519PublicKey | None = None
    for number, line in enumerate(lines, start=1):
        try:
            entry = _parse(line)
            if public is None:
                public = _public_key(entry)
            previous = line_digest(lines[number - 2]) if number > 1 else GENESIS
            _check_entry(entry, number - 1, previous, public)
        except LedgerError as error:
            return entries, f"line {number} {error}"
        entries.append(entry)
    return entries, None


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return a ledger's entries without opening it for writing: no key needed, nothing repaired.

    A torn last line (a write in progress, or one that was cut off) is left out. Raises LedgerError naming the
    line that does not hold.
    """
    entries, problem = read_chain(split_lines(path.read_bytes())[0])
    if problem is not None:
        raise LedgerError(f"{path}: {problem}; `glasshouse ledger verify` says what still holds")
    return entries


def _parse(line: bytes) -> dict[str, Any]:
    text = line.removesuffix(b"\n")
    try:
        entry = json.loads(text)
        same = canonical_json(entry) == text
    except (ValueError, RecursionError, GlasshouseError) as error:
        raise LedgerError(f"was changed: not readable as JSON ({error})") from error
    if not same:
        raise LedgerError("was changed: not in canonical form")
    if not isinstance(entry, dict) or set(entry) != FIELDS or not isinstance(entry["body"], dict):
        raise LedgerError(f"is no ledger entry: it must have exactly the fields {', '.join(sorted(FIELDS))}")
    return entry


def _public_key(first: dict[str, Any]) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(first["body"]["public_key"]))
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError("carries no valid public key in its body") from error


def _check_entry(entry: dict[str, Any], seq: int, previous: str, public: Ed25519PublicKey) -> None:
    try:
        signature = base64.b64decode(entry["sig"], validate=True)
        public.verify(signature, canonical_json({k: v for k, v in entry.items() if k != "sig"}))
    except (InvalidSignature, TypeError, ValueError) as error:
        raise LedgerError("was changed: its signature does not fit") from error
    if base64.b64encode(signature).decode("ascii") != entry["sig"]:
        raise LedgerError("was changed: its signature is not in canonical base64")
    if entry["prev"] != previous:
        raise LedgerError("does not follow the line before it: a line was changed, removed or moved")
    if entry["seq"] != seq or type(entry["seq"]) is not int:
        raise LedgerError(f"has sequence number {entry['seq']} where {seq} belongs")
