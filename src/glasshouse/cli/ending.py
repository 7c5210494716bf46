"""What a run prints when it has ended: what was decided, where the report lies, how to verify it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glasshouse.cli import show
from glasshouse.cli.report import written

if TYPE_CHECKING:
    from glasshouse.train import Outcome


def tell(path: Path, outcome: Outcome, *, checked: bool) -> int:
    """Write the report, print the ending and return the exit code: 0, or 8 when the checkpoint is held."""
    from glasshouse.base.errors import HeldError

    name = outcome.checkpoint.name
    if outcome.promoted:
        show.row("promoted", f"{name}: {outcome.reason}")
    elif checked:
        show.row("held", f"{name} is not promoted: {outcome.reason}")
    else:
        show.row("not checked", f"{name}: the recipe declares no constraint, so nothing can be promoted")
    counts = f"{outcome.gates} gates, {outcome.rollbacks} rollbacks, {outcome.seconds:.0f} s"
    show.row("run", f"{path} ({counts})")
    close(path)
    return HeldError.exit_code if checked and not outcome.promoted else 0


def close(path: Path) -> None:
    """Write the report and print where it is, the ledger's head, and the command that verifies it all."""
    from glasshouse.base.keys import public_hex, signing_key

    written(path)
    head = ledger_head(path)
    show.row("ledger head", head)
    show.row("verify", f"glasshouse ledger verify {path} --head {head} --key {public_hex(signing_key())}")


def ledger_head(path: Path) -> str:
    """The digest of the ledger's last line, to be kept outside the run."""
    from glasshouse.base.chain import GENESIS, line_digest, split_lines

    lines, _ = split_lines((path / "ledger.jsonl").read_bytes())
    return line_digest(lines[-1]) if lines else GENESIS
