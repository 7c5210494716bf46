"""Write the tables of the documentation from benchmarks/results/*.json, so that they cannot drift apart.

    .venv/bin/python benchmarks/tables.py

Every block between ``<!-- results: NAME -->`` and ``<!-- end -->`` is replaced by the rows of that file. A
word after the name chooses how: ``goals`` shows only rows with a goal, ``grid`` puts what stands before the
colon of "topk: L0" into columns, ``methods`` what stands after the last comma of "AUROC, hist, eap"; rows
without such a name follow as a plain table.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_text

HERE = Path(__file__).parent
DOCS = [HERE.parent / "docs" / name for name in ("performance.md", "lens.md")]
BLOCK = re.compile(r"(<!-- results: ([a-z_]+)(?: ([a-z]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
SPLIT = {
    "grid": re.compile(r"(?P<column>[^:]+): (?P<row>.+)"),
    "methods": re.compile(r"(?P<row>.+), (?P<column>[^,]+)"),
}
LEAST = 3  # rows that make a column

Row = dict[str, Any]


def shown(rows: list[Row], how: str | None) -> str:
    """Rows as Markdown, in the way that the marker asks for."""
    if how == "goals":
        return table([row for row in rows if row["goal"] is not None])
    if how is None:
        return table(rows)
    places = [SPLIT[how].fullmatch(row["metric"]) for row in rows]
    count = Counter(m["column"] for m in places if m)
    cells = {
        (m["row"], m["column"]): r
        for r, m in zip(rows, places, strict=True)
        if m and count[m["column"]] >= LEAST
    }
    columns, names = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        values = [number(cells[name, c]["value"]) if (name, c) in cells else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    rest = [r for r in rows if all(r is not one for one in cells.values())]
    after = table(rest) if rest else measured(list(cells.values()))
    return "\n".join(lines) + "\n\n" + after


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table, and where and when they were measured."""
    lines = ["| metric | value | peer | peer's value | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["metric"], number(row["value"]), row["peer"] or "", number(row["peer_value"])]
        cells += [str(row["goal"] or ""), "" if row["met"] is None else "yes" if row["met"] else "**no**"]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n\n" + measured(rows)


def measured(rows: list[Row]) -> str:
    """Where and when rows were measured."""
    places = sorted({f"{row['machine']}; commit {row['commit']}" for row in rows})
    return "\n".join(f"Measured on {place}." for place in places) + "\n"


def number(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    """Replace every block."""

    def block(match: re.Match[str]) -> str:
        path = HERE / "results" / f"{match[2]}.json"
        rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
        return match[1] + (shown(rows, match[3]) if rows else "Not measured yet.\n") + match[4]

    for doc in DOCS:
        text = doc.read_text("utf-8")
        write_text(doc, BLOCK.sub(block, text))
        print(f"{len(BLOCK.findall(text))} tables in {doc}")


if __name__ == "__main__":
    main()
