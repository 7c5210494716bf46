"""`glasshouse report`."""

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli import show


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report.html, complete in one file."""
    written(run)


def written(run: Path) -> Path:
    """Write the report of a run and say where it is. UsageError when the folder holds no run."""
    from glasshouse.base.errors import UsageError
    from glasshouse.page import write_report

    if not (run / "ledger.jsonl").is_file():
        raise UsageError(f"{run} is no run folder: it holds no ledger.jsonl")
    path = write_report(run)
    show.row("report", f"{path} ({path.stat().st_size / 1000:,.0f} kB)")
    return path
