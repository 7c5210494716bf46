"""metrics.jsonl: one row a line, appended; made durable whenever the ledger records how long it is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from glasshouse.base.atomic import disk_errors, fsync_folder
from glasshouse.base.errors import CheckpointError


class MetricsLog:
    """Append-only rows. Opening cuts off what was written after the ledger last recorded the size, because a
    resumed run writes those rows again."""

    def __init__(self, path: Path, recorded_bytes: int):
        """Raises CheckpointError when the file is shorter than recorded, DiskError when it cannot be
        written.
        """
        self.path = path
        with disk_errors(path):
            size = path.stat().st_size if path.exists() else 0
            if size < recorded_bytes:
                raise CheckpointError(
                    f"{path} has {size} bytes, but the ledger recorded {recorded_bytes}: it was truncated; "
                    "restore it from a backup, or start a new run"
                )
            is_new = not path.exists()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the loop runs)
            self._file.truncate(recorded_bytes)
            if is_new:
                fsync_folder(path.parent)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Values that are not finite become null: the file stays strict JSON."""
        clean = {k: [_known(x) for x in v] if isinstance(v, list) else _known(v) for k, v in row.items()}
        with disk_errors(self.path):
            self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def sync(self) -> int:
        """Make all rows durable and return the file's size in bytes."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; calling it twice is fine."""
        self._file.close()


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
