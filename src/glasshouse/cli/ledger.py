"""`glasshouse ledger verify`."""

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli import show

app = typer.Typer(help="Check what a run's ledger says.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Check what a run's ledger says."""


@app.command("verify")
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or its ledger.jsonl.")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST", help="The last entry's digest, kept elsewhere: proves nothing is missing."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The signer's public key (a file or 64 hex digits): proves who signed."
        ),
    ] = None,
) -> None:
    """Re-check chain, signatures and the digest of every file named.

    Prints what holds, what is wrong (the first line or file is named) and what could not be checked.
    """
    from glasshouse.base.errors import LedgerError
    from glasshouse.base.ledger_check import verify_ledger

    found = verify_ledger(run, head, key)
    show.row("ledger", f"{run}: {found.n_entries} entries")
    show.row("head", found.head)
    if found.public_key is not None:
        show.row("signed by", found.public_key)
    for problem in found.problems:
        show.row("WRONG", problem)
    for gap in found.unchecked:
        show.row("not checked", gap)
    show.row("result", found.summary)
    if not found.ok:
        raise typer.Exit(LedgerError.exit_code)
