"""Finished runs, a JSON line each: an interrupted benchmark loses one run, not all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Raw:
    """The file of finished runs; ``key`` names the fields that tell runs apart."""

    def __init__(self, path: Path, key: tuple[str, ...]):
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, *values: Any) -> bool:
        """Whether the run with these values of ``key`` is there."""
        return any(tuple(run[k] for k in self.key) == values for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self.runs.append(run)
