"""What a lens found, as one table with intervals, for a terminal, a notebook, a JSON file and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from markupsafe import Markup

from glasshouse.base.atomic import write_json, write_text
from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score
from glasshouse.draw import clean, esc, label, styled, table
from glasshouse.page.result import result_page

FORMAT = "glasshouse.lens/1"
HEAD = ("", "value", "95% interval", "n")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding(Generic[T]):
    """A result of a lens.

    ``found``: the thing itself (a dictionary, a probe report, a circuit, an attribution). ``rows``: its
    numbers in order, each a `Score` or words. ``about``: what was measured on what, as plain data; ``data``:
    everything else worth keeping in the JSON file. ``parts``: objects that show themselves (``_repr_html_``).
    """

    title: str
    found: T
    rows: Sequence[tuple[str, Score | str]]
    about: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Any] = ()
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> Score | str:
        known = dict(self.rows)
        if name not in known:
            raise UsageError(f"there is no number {name!r} here.{suggest(name, known)}")
        return known[name]

    def cells(self) -> list[tuple[str, str, str, str]]:
        """The table's cells: name, value, interval, n. A single sample has no interval."""
        return [(name, *cells_of(value)) for name, value in self.rows]

    def lines(self) -> list[str]:
        """The table for a terminal, and the notes beneath it."""
        rows = [HEAD, *((clean(a, 60), clean(b, 300), c, d) for a, b, c, d in self.cells())]
        widths = [max(len(r[i]) for r in rows if i != 1 or len(r[1]) <= 24) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        facts = [f"{name.replace('_', ' ')}: {clean(value, 300)}" for name, value in self.about.items()]
        return [*lines, *facts, *(clean(note, 600) for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join([clean(self.title), *self.lines()])

    def markup(self) -> list[Markup]:
        """The result in parts, escaped."""
        facts = [(name.replace("_", " "), str(value)) for name, value in self.about.items()]
        shown = [Markup(part._repr_html_()) for part in self.parts]  # made with draw, which escapes
        notes = Markup().join(Markup("<p class=soft>{}</p>").format(esc(note, 1000)) for note in self.notes)
        return [
            table(HEAD, self.cells(), self.title, numeric=(1, 2, 3)) + notes,
            *shown,
            table(("measured on", ""), facts, "What it was measured on"),
        ]

    def _repr_html_(self) -> str:
        return styled(*self.markup())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain data."""
        rows = {name: asdict(v) if isinstance(v, Score) else v for name, v in self.rows}
        about = {"format": FORMAT, "title": self.title, "about": dict(self.about)}
        return about | {"scores": rows, "notes": list(self.notes), **self.data}

    def save(self, path: str | Path, *, page: str | Path | None = None) -> tuple[Path, Path]:
        """Write ``path`` as JSON and a page on its own, at ``page`` or beside it with ``.html``."""
        path = Path(path)
        there = path.with_suffix(".html") if page is None else Path(page)
        if there == path:
            raise UsageError(f"{path} would be both the JSON file and the page; name it .json")
        write_json(path, self.to_dict())
        write_text(there, result_page(self.title, self.markup()))
        return path, there


def cells_of(value: Score | str) -> tuple[str, str, str]:
    """Value, interval and n of one number."""
    if isinstance(value, str):
        return value, "", ""
    interval = f"{label(value.low)} to {label(value.high)}" if value.n > 1 else "-"
    return label(value.value), interval, str(value.n)
