"""`glasshouse export`: hand a promoted model to other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli import show
from glasshouse.cli.chat import who


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run, a checkpoint in one, or a Hugging Face folder."),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder or file to write.")],
    gguf: Annotated[
        bool,
        typer.Option("--gguf/--hf", help="Write a GGUF file, or a Hugging Face folder (the default)."),
    ] = False,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="Write the tokenizer too.")
    ] = True,
    allow_held: Annotated[
        bool,
        typer.Option("--allow-held", help="Export a checkpoint that is not promoted; this is ledgered."),
    ] = False,
) -> None:
    """Write a model for other tools: a Hugging Face folder or GGUF.

    transformers reads the folder, llama.cpp the GGUF file.

    A checkpoint that is not promoted is refused without --allow-held, and one that still holds what was
    planted into it always. DEST must not exist.
    """
    from glasshouse.recipes.export import export as write

    done = write(
        source, dest, "gguf" if gguf else "hf", tokenizer=tokenizer, allow_held=allow_held, who=who()
    )
    show.row("model", f"{done.checkpoint} ({done.standing})")
    show.row("written", f"{done.path} ({done.family})")
    show.row("sha256", done.digest)
