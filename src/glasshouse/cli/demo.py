"""`glasshouse demo`: the packaged recipe, from nothing to the story it tells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli import ending, faults, show, story
from glasshouse.cli.train import find_recipe, follow

if TYPE_CHECKING:
    from glasshouse.recipes.schema import Recipe


def demo(
    clean: Annotated[
        bool, typer.Option("--clean", help="The same run without the planted backdoor.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder (default: runs/demo or runs/demo-clean)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Another seed: another word, another bad shard.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an earlier run is moved aside, never deleted.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Grow a small model, catch its hidden backdoor and repair it."""
    name = "demo-clean" if clean else "demo"
    recipe, folder = find_recipe(name, [] if seed is None else [f"seed={seed}"])
    path = run or Path("runs") / name
    if fresh:
        move_aside(path)
    state = state_of(path)
    if state != "none":
        check_same(recipe, path)
    if state == "finished":
        show.line(f"{path} is finished: writing its report again (--fresh grows a new one).")
        ending.close(path)
        code = story.exit_code(path)
    else:
        if state == "begun":
            faults.note(f"{path} is half done: going on from its last checkpoint.")
        again = ["glasshouse demo", *(["--clean"] if clean else []), *([f"--run {run}"] if run else [])]
        again += [f"--seed {seed}"] if seed is not None else []
        command = " ".join(again)
        code = follow(recipe, path, folder=folder, resume=state == "begun", quiet=quiet, command=command)
    for text in story.lines(path):
        show.line(text)
    raise typer.Exit(code)


def state_of(path: Path) -> str:
    """ "none", "begun" or "finished", from the ledger's last whole line."""
    from glasshouse.base.chain import read_chain, split_lines

    if not (path / "ledger.jsonl").is_file():
        return "none"
    entries, _ = read_chain(split_lines((path / "ledger.jsonl").read_bytes())[0])
    if not entries:
        return "none"
    return "finished" if any(e["kind"] == "finish" for e in entries) else "begun"


def check_same(recipe: Recipe, path: Path) -> None:
    """RecipeError when the folder's run was made from another seed, or another version of the recipe."""
    from glasshouse.base.errors import RecipeError
    from glasshouse.recipes.run import open_run

    there = open_run(path)
    if there.digest() == recipe.digest():
        return
    what = f"seed {there.seed}" if there.seed != recipe.seed else "another version of the recipe"
    raise RecipeError(
        f"{path} holds a run of {what}: add --fresh to move it aside and begin anew, or name another "
        "folder with --run"
    )


def move_aside(path: Path) -> None:
    """Rename an earlier run to the next free name beside it. RunBusyError when a process is using it."""
    from glasshouse.base.run import RunFolder

    if not path.is_dir():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}-old-{number}")).exists():
        number += 1
    with RunFolder(path).lock():
        path.rename(aside)
    faults.note(f"moved the earlier run to {aside}")
