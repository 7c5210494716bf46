"""`glasshouse train`, and what it shares with `glasshouse demo`: from a recipe to a reported run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli import ending, faults

if TYPE_CHECKING:
    from glasshouse.recipes.schema import Recipe

PACKAGED = {  # name: file, keep its plant
    "demo": ("demo.toml", True),
    "demo-clean": ("demo.toml", False),
    "constitutional": ("constitutional.toml", True),
    "constitutional-1b": ("constitutional-1b.toml", True),
}


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or a packaged recipe: demo, demo-clean.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stage.sft.steps=200."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder (default: runs/ and the recipe's name)."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was begun.")] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change", help="Go on although torch, threads or processor changed; this is ledgered."
        ),
    ] = False,
    after_stop: Annotated[
        str | None,
        typer.Option(metavar="WHO", help="Let a stopped run go on; who decided so is ledgered."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Run a recipe: every stage, every gate, then the report."""
    given = tuple(overrides or ())
    read, folder = find_recipe(recipe, given)
    path = run or Path("runs") / read.name
    again = ["glasshouse", "train", recipe, *given, *(["--run", str(run)] if run else []), "--resume"]
    code = follow(
        read,
        path,
        folder=folder,
        resume=resume,
        allow_change=allow_change,
        after_stop=after_stop,
        quiet=quiet,
        command=shlex.join(again),
    )
    raise typer.Exit(code)


def find_recipe(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """A recipe by file or packaged name, and the folder its relative paths start from.

    RecipeError, with the nearest packaged name, when there is no such recipe.
    """
    from glasshouse.base.errors import RecipeError, suggest
    from glasshouse.recipes.schema import load_recipe

    if name in PACKAGED:
        file, plant = PACKAGED[name]
        with as_file(files("glasshouse.recipes") / "files" / file) as path:
            return load_recipe(path, [f'name="{name}"', *overrides], plant=plant), path.parent
    path = Path(name)
    if not path.exists() and path.suffix == "" and path.name == name:
        raise RecipeError(
            f"{name}: neither a recipe file nor a packaged recipe.{suggest(name, PACKAGED)} "
            f"Packaged: {', '.join(PACKAGED)}"
        )
    return load_recipe(path, overrides), path.parent


def follow(
    recipe: Recipe,
    path: Path,
    *,
    folder: Path,
    resume: bool,
    command: str,
    allow_change: bool = False,
    after_stop: str | None = None,
    quiet: bool = False,
) -> int:
    """Train, write the report however it ended, say how it ended, and return the exit code."""
    from glasshouse.base.errors import Interrupted, Stopped, TrainingError
    from glasshouse.recipes.align.run import align as run_phases
    from glasshouse.recipes.run import train as run_recipe
    from glasshouse.train import make_progress

    progress = make_progress(quiet=quiet)
    try:
        outcome = (run_recipe if recipe.align is None else run_phases)(
            recipe,
            path,
            folder=folder,
            resume=resume,
            allow_change=allow_change,
            after_stop=after_stop,
            progress=progress,
            command=command,
        )
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted before there was anything to keep. Begin with: {command}") from None
    except (Interrupted, Stopped, TrainingError):
        # What happened so far is worth reading, but must not hide why the run ended.
        report_if_possible(path)
        raise
    finally:
        progress.close()
    return ending.tell(path, outcome, checked=bool(recipe.constraint))


def report_if_possible(path: Path) -> None:
    """Write the report of a run that did not end by itself; a failure to do so is only mentioned."""
    from glasshouse.base.errors import GlasshouseError
    from glasshouse.page import write_report

    if not (path / "ledger.jsonl").is_file():
        return
    try:
        faults.note(f"report so far: {write_report(path)}")
    except (GlasshouseError, OSError) as problem:
        faults.note(f"the report could not be written: {problem}")
