"""`glasshouse align`: the constitutional phases for a model that is there already."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli import show

if TYPE_CHECKING:
    from glasshouse.recipes.align.cost import Cost


def align(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a checkpoint in one, or a Hugging Face folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stage.rl.steps=200."),
    ] = None,
    constitution: Annotated[
        str, typer.Option(metavar="FILE", help="A constitution (TOML), or a shipped one's name.")
    ] = "general",
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Red-team prompts: JSONL with "prompt", or one a line (.txt).'),
    ] = None,
    helpful: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Harmless prompts, so that it stays helpful.")
    ] = None,
    judge: Annotated[
        str, typer.Option(metavar="MODEL|URL", help='Who compares answers; "base" is the model itself.')
    ] = "base",
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the endpoint calls its model.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="After the supervised phase: grpo, ppo, dpo or none.")
    ] = "grpo",
    constraints: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="[[constraint]] tables, or a shipped pack's name, for every gate."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder (default: runs/ and align-MODEL).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was begun.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Align a model by a written constitution.

    Revisions, AI feedback, a reward model and RL, every phase under the constraints. The cost is printed
    first. Killed anywhere, the same command with --resume goes on. A promoted result is a Hugging Face folder
    (`export` in the run folder).
    """
    from glasshouse.cli.train import follow
    from glasshouse.recipes.align.cost import cost
    from glasshouse.recipes.align.template import recipe_for

    recipe, folder = recipe_for(
        model,
        constitution,
        prompts=prompts,
        helpful=helpful,
        judge=judge,
        judge_model=judge_model,
        method=method,
        constraints=constraints,
        overrides=tuple(overrides or ()),
    )
    path = out or Path("runs") / f"align-{model.resolve().name}"
    options = {"constitution": constitution, "prompts": prompts, "helpful": helpful, "judge": judge}
    options |= {"judge-model": judge_model, "method": method, "constraints": constraints, "out": out}
    again = ["glasshouse", "align", str(model), *(overrides or ())]
    again += [
        word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))
    ]
    if not resume:
        show_cost(cost(recipe, folder), judge)
    code = follow(
        recipe, path, folder=folder, resume=resume, command=shlex.join([*again, "--resume"]), quiet=quiet
    )
    if not recipe.constraint:
        show.row("hand it on", f"glasshouse export {path} DEST --allow-held")
    raise typer.Exit(code)


def show_cost(found: Cost, judge: str) -> None:
    """What it will take, by phase."""
    show.row("model", f"{found.parameters / 1e6:.1f} million parameters")
    show.line("cost, at most:")
    for name, what, written, read, trained in found.rows:
        tokens = [(written, "written"), (read, "read"), (trained, "trained on")]
        told = ", ".join(f"{n:,.0f} tokens {verb}" for n, verb in tokens if n)
        show.line(f"  {name:<14}{what}: {told}")
    elsewhere = "; the judge's own time comes on top" if "://" in judge else ""
    show.row("time", f"about {found.seconds / 60:.1f} minutes on this machine{elsewhere}")
