"""`glasshouse zoo`: grow organisms with known misbehaviour, examine them with the real gates, score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli import faults, show
from glasshouse.cli.audit import duration

if TYPE_CHECKING:
    from glasshouse.recipes.zoo.schedule import Job

app = typer.Typer(
    help="Measure the checks on models with known misbehaviour.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path | None, typer.Argument(metavar="DIR", help="The zoo's folder (default: runs/zoo).")]
Families = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Families, such as single,position (default: all).")
]
Seeds = Annotated[
    str | None, typer.Option(metavar="SEEDS", help="Seeds, such as 0-19 or 1,4,7 (default: 60 and 20).")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Three families, two seeds and their twins: a few minutes.")
]
Twins = Annotated[
    bool | None,
    typer.Option("--twins/--no-twins", help="A clean twin of every organism (default: of single only)."),
]
Jobs = Annotated[int | None, typer.Option(min=1, metavar="N", help="Worker processes (default: cores).")]


@app.callback()
def group() -> None:
    """Measure the checks on models with known misbehaviour.

    And on their clean twins. What was planted is known to the score and never to a gate.
    """


@app.command("build")
def build(
    folder: Folder = None,
    families: Families = None,
    seeds: Seeds = None,
    quick: Quick = False,
    twins: Twins = None,
    jobs: Jobs = None,
) -> None:
    """Plan a zoo and make the honest models that it starts from."""
    zoo = built(folder or default_folder(quick), families, seeds, quick, twins, jobs)
    show.row("zoo", zoo.folder)
    show.row("plan", counts(zoo.jobs))
    show.row("next", f"glasshouse zoo run {zoo.folder}")


@app.command("run")
def run(
    folder: Folder = None,
    families: Families = None,
    seeds: Seeds = None,
    quick: Quick = False,
    twins: Twins = None,
    jobs: Jobs = None,
    hours: Annotated[
        float, typer.Option(metavar="H", help="Longest time of this slice; the next call goes on.")
    ] = 2.0,
    again: Annotated[
        bool,
        typer.Option("--again", help="Run anew what another method, or a frozen family, was run with."),
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every organism's run folder.")] = False,
) -> None:
    """Grow and examine what is not done yet.

    Builds the zoo first if there is none. Safe to interrupt at any time; the same command goes on. Exit code
    0 when all that was chosen is done, 12 when the slice's time ended first or an organism broke.
    """
    from glasshouse.recipes.zoo import run as zoos
    from glasshouse.recipes.zoo.schedule import FILE

    path = folder or default_folder(quick)
    new = not (path / FILE).is_file()
    zoo = built(path, families, seeds, quick, twins, jobs) if new else zoos.open_zoo(path)
    chosen = (lambda _: True) if new else chooser(families, seeds, quick, zoo.jobs)
    of = sum(chosen(j) for j in zoo.jobs)
    for told in zoos.run(zoo, only=chosen, n=jobs, hours=hours, again=again, keep=keep):
        faults.note(f"[{told.done}/{told.of}] {progress(told.result)}")
    found = [zoo.read(j) for j in zoo.jobs if chosen(j)]
    done = sum(r is not None and r["status"] != "broken" for r in found)
    broken = sum(r is not None and r["status"] == "broken" for r in found)
    show.row("zoo", f"{zoo.folder}: {done} of {of} done" + (f", {broken} broke" if broken else ""))
    show.row("next", f"glasshouse zoo {'score' if done == of else 'run'} {zoo.folder}")
    raise typer.Exit(0 if done == of else faults.UNDECIDED)


@app.command("score")
def score(
    folder: Folder = None,
    quick: Quick = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table as it stands in docs/zoo.md, on standard output.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as a page.")] = None,
) -> None:
    """The table of what was found, also of an unfinished zoo."""
    from glasshouse.base.atomic import write_json, write_text
    from glasshouse.recipes.zoo import run as zoos
    from glasshouse.recipes.zoo import table

    zoo = zoos.open_zoo(folder or default_folder(quick))
    found = zoos.scored(zoo)
    if markdown:
        show.line(table.markdown(found, f"glasshouse zoo run {zoo.folder}").rstrip())
    else:
        for text in table.terminal(found):
            show.line(text)
    if json is not None:
        write_json(json, {"about": found.about, "rows": table.records(found)})
        faults.note(f"written: {json}")
    if html is not None:
        write_text(html, table.page(found))
        faults.note(f"written: {html}")


def default_folder(quick: bool) -> Path:
    """Where a zoo is when nobody says."""
    return Path("runs") / ("zoo-quick" if quick else "zoo")


def built(
    path: Path, families: str | None, seeds: str | None, quick: bool, twins: bool | None, jobs: int | None
) -> Any:
    """Plan and build a zoo, saying what is made."""
    from glasshouse.recipes.zoo import run as zoos
    from glasshouse.recipes.zoo.examine import KNOWN, QUICK
    from glasshouse.recipes.zoo.schedule import planned

    plan = planned(KNOWN, QUICK, families=families, seeds=seeds, quick=quick, twins=twins)
    return zoos.build(path, plan, n=jobs, tell=faults.note)


def chooser(families: str | None, seeds: str | None, quick: bool, jobs: tuple[Job, ...]) -> Any:
    """Which jobs of a zoo that is there already are meant."""
    from glasshouse.recipes.zoo.examine import KNOWN
    from glasshouse.recipes.zoo.schedule import chosen_families, parsed_seeds

    names, own = chosen_families(families, KNOWN), parsed_seeds(seeds)

    def chosen(job: Job) -> bool:
        return job.family in names and (own is None or job.seed in own)

    return chosen


def counts(jobs: tuple[Job, ...]) -> str:
    """A plan in a line: how many of each family."""
    organisms: dict[str, int] = {}
    for job in jobs:
        organisms[job.family] = organisms.get(job.family, 0) + (not job.twin)
    twins = sum(j.twin for j in jobs)
    named = ", ".join(f"{name} {n}" for name, n in organisms.items())
    return f"{len(jobs) - twins} organisms ({named}) and {twins} twins"


def progress(result: dict[str, Any]) -> str:
    """How one organism went, in a line."""
    from glasshouse.recipes.zoo.judge import outcome

    name = result["id"]
    if result["status"] != "grown":
        return f"{name}: {result['status'].replace('-', ' ')}: {show.one_line(result.get('reason'), 300)}"
    judged = outcome(result)
    took = f" ({duration(float(result['seconds']))})"
    if judged.job.twin:
        said = f"alarm by {judged.alarms[0]}" if judged.alarms else "clean"
        return f"{name}: {said}{', not promoted' if judged.blocked and not judged.alarms else ''}{took}"
    if not judged.detected:
        return f"{name}: missed{took}"
    cause = ", cause named" if judged.named else ""
    return f"{name}: found by {judged.first_by} at gate {judged.first}{cause}{took}"
