"""`glasshouse audit`: the cost first, then the verdicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli import faults, show

if TYPE_CHECKING:
    from glasshouse.recipes.audit import Audit

SECONDS = {"s": 1, "m": 60, "h": 3600}
ChatFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How requests are put: glasshouse, chatml, llama3, plain (default: told by the tokenizer).",
    ),
]


def audit(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a checkpoint in one, or a Hugging Face folder.")
    ],
    constraints: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A TOML file of [[constraint]] tables, or a shipped pack's name."),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Longest time for searches, such as 90s, 20m or 1h (default: no limit)."
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="What it was trained from: for constraints on what changed."),
    ] = None,
    envelope: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What clean updates are like (made by `glasshouse envelope`)."),
    ] = None,
    chat_format: ChatFormat = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Draws other prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdicts there too.")] = None,
) -> None:
    """Check constraints on a model on disk. Incomplete coverage is `undecided`, never a pass.

    Exit code: 0 all pass, 9 a check failed or broke, 12 nothing failed but something is undecided or not
    applicable.
    """
    from glasshouse.base.atomic import write_json
    from glasshouse.recipes.audit import plan_audit

    planned = plan_audit(
        model,
        constraints,
        before=before,
        envelope=envelope,
        budget_s=seconds(budget),
        seed=seed,
        chat=chat_format,
    )
    show_cost(planned)
    verdicts = planned.run()
    show.line()
    for text in table(verdicts):
        show.line(text)
    if json is not None:
        write_json(json, {**about(planned), "verdicts": list(verdicts)})
        show.row("written", json)
    raise typer.Exit(exit_code([v["status"] for v in verdicts]))


def seconds(budget: str | None) -> float | None:
    """90s, 20m, 1.5h or a bare number of seconds. UsageError for anything else."""
    from glasshouse.base.errors import UsageError

    if budget is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", budget.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--budget {budget!r} is no time; give for example 90s, 20m or 1h")
    return float(match[1]) * SECONDS[match[2] or "s"]


def show_cost(planned: Audit) -> None:
    """What the audit will take, by constraint, before it is spent."""
    show.row("model", f"{planned.loaded.checkpoint} ({planned.loaded.standing})")
    show.row("asked in", f"{planned.chat.name} format")
    show.line("cost, at most:")
    width = max(len(name) for name in ("together", *planned.passes))
    for name, passes in planned.passes.items():
        time = duration(passes * planned.seconds_per_pass)
        show.line(f"  {name:<{width}}  {passes:>12,} forward passes  {time:>8}")
    if len(planned.passes) > 1:
        together = sum(planned.passes.values())
        show.line(f"  {'together':<{width}}  {together:>12,} forward passes  {duration(planned.seconds):>8}")
    if planned.budget_s is not None and planned.budget_s < planned.seconds:
        faults.note(
            f"the budget of {duration(planned.budget_s)} is less: searches will cover a part, and what they "
            "do not cover stays undecided"
        )


def duration(value: float) -> str:
    """Seconds as "42 s", "7 min" or "1.5 h"."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def table(verdicts: list[dict[str, Any]]) -> list[str]:
    """A line for each verdict, its reason beneath it unless it passed."""
    rows = [
        ("constraint", "status", "estimate", "95% interval", "bound", "n", "coverage"),
        *map(cells, verdicts),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for number, row in enumerate(rows):
        out.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if number and verdicts[number - 1]["status"] != "pass" and verdicts[number - 1]["reason"]:
            out += show.wrapped("  because", verdicts[number - 1]["reason"])
    return out


def cells(verdict: dict[str, Any]) -> tuple[str, ...]:
    """One verdict as text."""
    side, value = next(iter(verdict["bound"].items()))
    low_high = verdict["interval"]
    share = (verdict["coverage"] or {}).get("share")
    return (
        verdict["constraint"],
        verdict["status"].replace("_", " "),
        "-" if verdict["estimate"] is None else f"{verdict['estimate']:.3f}",
        "-" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}",
        f"{side.replace('_', ' ')} {value}",
        str(verdict["n"]),
        "-" if share is None else f"{share:.0%}" if share == 1 else f"{share:.1%}",
    )


def about(planned: Audit) -> dict[str, Any]:
    """What was audited, by digest, and at what cost."""
    return {
        "model": planned.loaded.checkpoint,
        "digest": planned.loaded.digest,
        "standing": planned.loaded.standing,
        "constraints": {c.id: c.digest() for c in planned.constraints},
        "words_from": planned.words_from,
        "chat_format": planned.chat.name,
        "seed": planned.seed,
        "passes": planned.passes,
        "seconds_per_pass": planned.seconds_per_pass,
        "budget_s": planned.budget_s,
    }


def exit_code(statuses: list[str]) -> int:
    """0 when all pass; a failure or a broken check outranks what is undecided."""
    from glasshouse.base.errors import VerificationError

    if any(s in ("fail", "error") for s in statuses):
        return VerificationError.exit_code
    return faults.UNDECIDED if any(s != "pass" for s in statuses) else 0
