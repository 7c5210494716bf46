"""The constraints that ship with the product, found by name: `refusal`, or `packs/refusal.toml`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Every shipped pack by its name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}


def pack_file(path: Path) -> Path:
    """The file meant by ``path``: itself if it is there, else the shipped pack of that name.

    `refusal`, `refusal.toml` and `packs/refusal.toml` all name the shipped one. A path that is neither comes
    back as it is: whoever opens it says that it is missing.
    """
    if path.exists() or path.parent not in (Path(), Path("packs")) or path.suffix not in ("", ".toml"):
        return path
    return shipped().get(path.stem, path)
