"""Which method a zoo measures: one digest over its source, written down before frozen families are run.

A family is frozen when nobody may tune on it. It is run once. What was run, under which method, stands in a
ledger of its own in $GLASSHOUSE_HOME, so that another folder is no way round it, and again in the zoo's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import digest_folder, sha256_bytes
from glasshouse.base.errors import UsageError
from glasshouse.base.keys import glasshouse_home, signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PACK = "recipes/files/zoo.toml"
# Every source file below these: what a verdict is computed by, prompts and labels included.
ROOMS = ("base", "tokenizer", "model", "data", "interp", "evals", "verify")
FILES = (PACK,)


def sources() -> dict[str, str]:
    """SHA-256 of every file that decides a verdict, by its path within the package."""
    names = [p.relative_to(ROOT).as_posix() for room in ROOMS for p in (ROOT / room).rglob("*.py")]
    return digest_folder(ROOT, [*names, *FILES])


def digest(found: dict[str, str] | None = None) -> str:
    """The method's name: SHA-256 over `sources`."""
    return sha256_bytes(canonical_json(sources() if found is None else found))


def pack_text() -> str:
    """The constraints that every organism is examined with, as TOML."""
    with as_file(files("glasshouse.recipes") / "files" / "zoo.toml") as path:
        return path.read_text(encoding="utf-8")


def frozen_runs(family: str) -> list[dict[str, Any]]:
    """What the ledger of frozen families holds about one of them, oldest first."""
    register = _register()
    if not register.ledger.is_file():
        return []
    return [
        e["body"]
        for e in Ledger(register.ledger, signing_key()).entries("frozen")
        if e["body"]["family"] == family
    ]


def allow_frozen(
    frozen: Sequence[str], method: str, zoo: Path, ledger: Ledger, *, again: bool = False
) -> None:
    """Write down that these frozen families are now run under ``method``, once.

    Going on under the same method in the same zoo is no second run. UsageError for a second run under another
    method, or of the same method elsewhere, unless ``again``, which is recorded.
    """
    for family in frozen:
        earlier = frozen_runs(family)
        place = str(zoo.resolve())
        if any(e["method"] == method and e["zoo"] == place for e in earlier):
            continue
        if earlier and not again:
            last = earlier[-1]
            other = "with this method" if last["method"] == method else f"with method {last['method'][:16]}"
            raise UsageError(
                f"{family} is a frozen family and was run {other} in {last['zoo']}: it is run once, so that "
                f"nothing is tuned on it. Leave it out with --families, or add --again (this is ledgered; "
                f"the present method is {method[:16]})"
            )
        body = {"family": family, "method": method, "zoo": place, "again": len(earlier)}
        register = _register()
        with register.lock():
            Ledger(register.ledger, signing_key()).append("frozen", body)
        ledger.append("frozen", body)


def _register() -> RunFolder:
    return RunFolder(glasshouse_home() / "zoo")
