"""Write the tables of docs/performance.md from benchmarks/results/*.json, so that they cannot drift apart.

    .venv/bin/python benchmarks/tables.py

Every block between ``<!-- results: NAME -->`` and ``<!-- end -->`` is replaced by the rows of that file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import write_text

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- results: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, and where and when they were measured."""
    lines = ["| metric | value | peer | peer's value | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["metric"], number(row["value"]), row["peer"] or "", number(row["peer_value"])]
        cells += [str(row["goal"] or ""), "" if row["met"] is None else "yes" if row["met"] else "**no**"]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    places = sorted({f"{row['machine']}; commit {row['commit']}" for row in rows})
    return "\n".join(lines) + "\n\n" + "\n".join(f"Measured on {place}." for place in places) + "\n"


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
        return match[1] + (table(rows) if rows else "Not measured yet.\n") + match[3]

    text = DOC.read_text("utf-8")
    write_text(DOC, BLOCK.sub(block, text))
    print(f"{len(BLOCK.findall(text))} tables in {DOC}")


if __name__ == "__main__":
    main()
