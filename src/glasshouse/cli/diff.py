"""`glasshouse diff`: what changed inside between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli import show
from glasshouse.cli.audit import ChatFormat, seconds


def diff(
    before: Annotated[
        Path, typer.Argument(metavar="A", help="A run, a checkpoint, or a Hugging Face folder.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another with the same tokenizer.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What both read (default: the run's, or the books).")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check these on both: which evidence moved?")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Longest time for both audits, such as 5m.")
    ] = None,
    chat_format: ChatFormat = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Draws other prompts.")] = 0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the numbers there, and a page beside it.")
    ] = None,
) -> None:
    """Compare two checkpoints: what changed inside and in verdicts.

    Predictions, residual stream, matrices and embedding rows; with --constraints, both audits.
    """
    from glasshouse.recipes.diff import diff as compare

    found = compare(
        before,
        after,
        text=text,
        constraints=constraints,
        budget_s=seconds(budget),
        seed=seed,
        chat_format=chat_format,
    )
    for text_line in str(found).splitlines():
        show.line(text_line)
    if json is not None:
        for file in found.save(json):
            show.row("written", file)
