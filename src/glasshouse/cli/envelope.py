"""`glasshouse envelope`: what clean training runs do to the weights, as a file to compare others with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli import faults, show


def envelope(
    twins: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished clean runs; with --from also Hugging Face folders."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file to write; it must not exist.")],
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="What all of them were trained from: measure whole trainings, not from gate to gate.",
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            min=0.001, max=0.5, metavar="A", help="The level to decide at: says how many runs it takes."
        ),
    ] = 0.05,
) -> None:
    """Measure what clean runs do to the weights, for comparison.

    It is what constraints compare with that ask whether an update is ordinary. Give runs of one recipe on
    data known to be clean, with different seeds. They are dealt in the order given: a fifth says what is
    normal, the last is the control, an update is ranked among the others. A run whose gate held a failure,
    went back or stopped is refused, and so is one with something planted in it.
    """
    from glasshouse.recipes.envelope import make_envelope

    made = make_envelope(twins, out, before=start)
    show.row("written", made.path)
    show.row("sha256", made.sha256)
    show.row("runs", f"{made.fitted} say what is normal, {made.ranked} are ranked, 1 is the control")
    show.row(
        "judges",
        "any whole training"
        if start is not None
        else f"{len(made.moments)} moments: "
        + ", ".join(made.moments[:6])
        + (" ..." if len(made.moments) > 6 else ""),
    )
    show.row("decides at", f"alpha of at least {made.level:.3g}")
    show.row("declare", made.declaration)
    if made.left_out:
        faults.note(f"not in every run, and so left out: {', '.join(made.left_out)}")
    if (more := made.missing(alpha)) > 0:
        faults.note(f"alpha = {alpha:g} takes {more} clean runs more; until then nothing is decided at it")
