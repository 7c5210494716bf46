"""The Ed25519 key that signs ledgers: one per person and machine, made on first use.

It lives in $GLASSHOUSE_HOME or ~/.config/glasshouse, never in a run folder: who can change a run should
not find there what is needed to sign it anew.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from glasshouse.base.atomic import disk_errors, fsync_folder, temporary_beside
from glasshouse.base.errors import LedgerError

UNREADABLE = (OSError, ValueError, TypeError, UnsupportedAlgorithm)


def glasshouse_home(home: str | Path | None = None) -> Path:
    """Return `home`, else $GLASSHOUSE_HOME, else ~/.config/glasshouse."""
    return Path(home or os.environ.get("GLASSHOUSE_HOME") or Path.home() / ".config" / "glasshouse")


def signing_key(home: str | Path | None = None) -> Ed25519PrivateKey:
    """Return the key in `ledger.key`, making it (mode 0600, fsynced) if there is none.

    Raises `LedgerError` if the file is not an Ed25519 key or other users may read it, `DiskError` if
    it cannot be written.
    """
    path = glasshouse_home(home) / "ledger.key"
    if not path.exists():
        _create(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise LedgerError(f"other users may read {path}, so it proves nothing: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except UNREADABLE as error:
        raise LedgerError(f"{path} is no readable private key ({error}): restore a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerError(f"{path} is not an Ed25519 key: move it away and a new one is made")
    return key


def public_pem(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """Return the public half as PEM, to give to whoever verifies."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_hex(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Return the raw 32-byte public half as 64 hex digits, as ledgers carry it."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes_raw().hex()


def load_public(path: str | Path) -> Ed25519PublicKey:
    """Read a public key: PEM, or a text file with 64 hex digits. Raises `LedgerError` if it is neither."""
    try:
        data = Path(path).read_bytes()
        if not data.lstrip().startswith(b"-----"):
            return Ed25519PublicKey.from_public_bytes(bytes.fromhex(data.decode("ascii").strip()))
        key = serialization.load_pem_public_key(data)
    except UNREADABLE as error:
        raise LedgerError(f"{path} is not a readable public key ({error})") from error
    if not isinstance(key, Ed25519PublicKey):
        raise LedgerError(f"{path} is not an Ed25519 public key")
    return key


def _create(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    temporary = temporary_beside(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                os.write(descriptor, pem)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            try:
                # link, not rename: if another process made the key meanwhile, theirs stays.
                os.link(temporary, path)
            except FileExistsError:
                return
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)
