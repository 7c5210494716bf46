"""How results look on a terminal: text from data or models is cleaned, nothing is read as markup."""

from __future__ import annotations

import textwrap

import typer

from glasshouse.draw.text import clean

LABEL = 13  # characters before a value


def line(text: str = "") -> None:
    """One line on standard output, hidden characters made visible."""
    typer.echo(clean(text, 100_000))


def row(label: str, value: object) -> None:
    """A label and its value, in two columns."""
    line(f"{label:<{LABEL}}{one_line(value, 2_000)}")


def wrapped(label: str, text: object) -> list[str]:
    """A label and a text that may be long, cleaned, as lines."""
    parts = textwrap.wrap(one_line(text, 2_000), 84) or [""]
    return [f"{label if number == 0 else '':<{LABEL}}{part}" for number, part in enumerate(parts)]


def one_line(value: object, limit: int = 400) -> str:
    """`value` cleaned, on one line."""
    return " ".join(clean(value, limit).split())
