"""`glasshouse chat`: talk to what was promoted."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli import faults, show

if TYPE_CHECKING:
    from glasshouse.model.sampling import Sampling
    from glasshouse.recipes.api import Loaded


def chat(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, a checkpoint in one, or a model folder.")
    ],
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Ask this and leave.")
    ] = None,
    allow_held: Annotated[
        bool,
        typer.Option("--allow-held", help="Talk to a checkpoint that is not promoted; this is ledgered."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 80,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest word; above it, words are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Draw from the likeliest words that reach P.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", metavar="P", help="Draw from words at least P times as likely as the likeliest."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed draws another answer.")] = 0,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Said before every message; '' for nothing. Default: what the run was judged under.",
        ),
    ] = None,
) -> None:
    """Talk to the promoted model of a run.

    Each message is answered on its own. On a terminal it asks for messages (Ctrl-D leaves); without one,
    each line of standard input is a message.
    """
    from glasshouse.base.errors import UsageError
    from glasshouse.model.sampling import Sampling
    from glasshouse.recipes.api import asked_under, serveable

    sampling = Sampling(temperature, top_p=top_p, min_p=min_p)
    if message is not None:
        check_text(message, "--message")
    found = serveable(run, allow_held=allow_held, who=who())
    system = asked_under(run, found) if system is None else system
    faults.note(f"{found.checkpoint} ({found.standing}){f', asked under {system}' if system else ''}")
    if message is not None:
        show.line(answer(found, message, max_new_tokens, sampling, seed, system))
    elif not sys.stdin.isatty():
        for asked in piped_lines():
            show.line(answer(found, asked, max_new_tokens, sampling, seed, system))
    else:
        for asked in typed_lines():
            try:
                show.line(answer(found, asked, max_new_tokens, sampling, seed, system))
            except UsageError as problem:
                faults.note(problem)


def answer(
    found: Loaded, message: str, max_new_tokens: int, sampling: Sampling, seed: int, system: str = ""
) -> str:
    """The answer to one message. UsageError when the message leaves no room in the context."""
    from glasshouse.base.errors import UsageError
    from glasshouse.model.generate import generate
    from glasshouse.tokenizer import render

    asked = [{"role": "system", "content": system}] if system else []
    ids = render(found.tokenizer, [*asked, {"role": "user", "content": message}], generation_prompt=True)
    room = found.model.config.context - len(ids)
    if room < 1:
        raise UsageError(
            f"the message has {len(ids)} tokens and the model's context is {found.model.config.context}: "
            "shorten it"
        )
    assert found.tokenizer.end is not None, "render refuses a tokenizer without chat tokens"
    made = generate(
        found.model,
        [ids],
        min(room, max_new_tokens),
        stop={found.tokenizer.end},
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seeds=[seed],
        vocab=found.tokenizer.vocab_size,
    )
    return found.tokenizer.decode(made[0].ids).strip()


def typed_lines() -> Iterator[str]:
    """What a person types, until Ctrl-D."""
    import readline  # noqa: F401  (importing it gives input() a history and editing)

    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            show.line()
            return
        except UnicodeDecodeError:
            faults.note("that was not UTF-8 text; try again")
            continue
        if asked:
            yield asked


def piped_lines() -> Iterator[str]:
    """The lines of standard input that hold something. UsageError for one that is not UTF-8."""
    from glasshouse.base.errors import UsageError

    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            asked = raw.decode("utf-8").strip()
        except UnicodeDecodeError as problem:
            raise UsageError(
                f"line {number} of standard input is not UTF-8 (byte {problem.start}); convert it first"
            ) from problem
        if asked:
            yield asked


def check_text(text: str, where: str) -> None:
    """UsageError for an argument that is empty or was not UTF-8 (Python keeps such bytes as surrogates)."""
    from glasshouse.base.errors import UsageError

    if not text.strip():
        raise UsageError(f"{where} is empty; give it some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(
            f"{where} is not UTF-8 (at character {problem.start}); convert it first"
        ) from problem


def who() -> str:
    """The person at the keyboard, for the ledger."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        return "unnamed"
