from __future__ import annotations

import hashlib
from pathlib import Path

from glasshouse.base.digest import digest_folder, sha256_bytes, sha256_file


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_a_folder_lists_every_file_below_it_by_posix_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"b")
    (tmp_path / "a").write_bytes(b"a")
    assert digest_folder(tmp_path) == {"a": sha256_bytes(b"a"), "sub/b": sha256_bytes(b"b")}
    assert digest_folder(tmp_path, ["sub/b"]) == {"sub/b": sha256_bytes(b"b")}
