from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from glasshouse.base.errors import LedgerError
from glasshouse.base.keys import load_public, public_hex, public_pem, signing_key


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    key = signing_key(home)
    assert stat.S_IMODE((home / "ledger.key").stat().st_mode) == 0o600
    assert public_hex(signing_key(home)) == public_hex(key)
    assert [path.name for path in home.iterdir()] == ["ledger.key"]
    assert public_hex(signing_key(tmp_path / "other")) != public_hex(key)


def test_the_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSHOUSE_HOME", str(tmp_path / "h"))
    signing_key()
    assert (tmp_path / "h" / "ledger.key").is_file()


def test_a_public_key_is_read_back_from_pem_and_from_hex(tmp_path: Path) -> None:
    key = signing_key(tmp_path)
    (tmp_path / "pem").write_bytes(public_pem(key))
    (tmp_path / "hex").write_text(public_hex(key) + "\n")
    assert public_hex(load_public(tmp_path / "pem")) == public_hex(key)
    assert public_hex(load_public(tmp_path / "hex")) == public_hex(key)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    signing_key(tmp_path)
    (tmp_path / "ledger.key").chmod(0o644)
    with pytest.raises(LedgerError, match="chmod 600"):
        signing_key(tmp_path)


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.key").write_text("nonsense")
    (tmp_path / "ledger.key").chmod(0o600)
    with pytest.raises(LedgerError, match="no readable private key"):
        signing_key(tmp_path)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "ec").write_bytes(
        other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(LedgerError, match="not an Ed25519 public key"):
        load_public(tmp_path / "ec")
    (tmp_path / "empty").write_text("")
    for name in ("empty", "absent", "ledger.key"):
        with pytest.raises(LedgerError, match="no|not"):
            load_public(tmp_path / name)
