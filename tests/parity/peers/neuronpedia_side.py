"""Neuronpedia's side: its database schema and its graph schema, from its source folder.

It has no package; its importer is SQL over the columns of ``schema.prisma``. Ours are held against that:
every field is a column and of the column's type, and every column without a default is there.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from exchange import main

SOURCE = Path(sys.argv[3])
TABLES = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
TABLES |= {"model": "Model", "source": "Source", "sourceset": "SourceSet"}
TYPES: dict[str, tuple[type, ...]] = {
    "String": (str,),
    "Float": (int, float),
    "Int": (int,),
    "Boolean": (bool,),
}
TYPES |= {"DateTime": (str,)}
RELATIONS = {"scores"}  # kept in a table of their own; the importer passes over them


def columns(table: str) -> dict[str, tuple[str, str, bool]]:
    """Name -> (type, "", "?" or "[]", whether a line must have it) of a table."""
    schema = (SOURCE / "apps/webapp/prisma/schema.prisma").read_text("utf-8")
    body = re.search(rf"^model {table} \{{(.*?)^\}}", schema, re.MULTILINE | re.DOTALL)
    assert body is not None, table
    found = {}
    for line in body[1].splitlines():
        part = re.match(r"\s+(\w+)\s+(\w+)(\?|\[\])?(.*)", line)
        if part and part[2] in TYPES:
            needed = not part[3] and "@default" not in part[4] and "@updatedAt" not in part[4]
            found[part[1]] = (part[2], part[3] or "", needed)
    return found


def problems(table: str, row: dict[str, Any]) -> list[str]:
    """What the table would not take."""
    known, found = columns(table), []
    for name, (kind, form, needed) in known.items():
        if name not in row:
            found += [f"{table}.{name} is missing"] if needed else []
            continue
        values = row[name] if form == "[]" else [row[name]]
        if not (form == "?" and row[name] is None):
            found += [f"{table}.{name}: {v!r}" for v in values if not isinstance(v, TYPES[kind])]
    return found + [f"{table}.{n} is no column" for n in row.keys() - known.keys() - RELATIONS]


def graph_problems(data: Any, schema: dict[str, Any], where: str = "graph") -> list[str]:
    """The parts of JSON Schema that Neuronpedia's graph schema uses: type, required, properties, items."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "null": type(None),
    }
    allowed = schema.get("type", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if allowed and not any(isinstance(data, kinds[a]) for a in allowed):
        return [f"{where} is {type(data).__name__}"]
    found = []
    if isinstance(data, dict):
        found += [f"{where}.{key} is missing" for key in schema.get("required", []) if key not in data]
        for key, part in schema.get("properties", {}).items():
            found += graph_problems(data[key], part, f"{where}.{key}") if key in data else []
    if isinstance(data, list) and "items" in schema:
        for i, item in enumerate(data):
            found += graph_problems(item, schema["items"], f"{where}[{i}]")
    return found


def check(root: Path) -> None:
    report: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.jsonl*")):
        kind = path.name.partition(".")[0] if path.suffix == ".jsonl" else path.parent.name
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in raw.splitlines()]
        report[kind] = ([] if rows else ["no rows"]) + [
            p for row in rows for p in problems(TABLES[kind], row)
        ]
    schema = json.loads((SOURCE / "apps/webapp/app/api/graph/graph-schema.json").read_text("utf-8"))
    report["graph"] = graph_problems(json.loads((root / "ours.json").read_text("utf-8")), schema)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    else:
        main([], lambda root: None, None)
