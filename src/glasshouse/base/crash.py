"""Places at which tests kill the process, to show that nothing is lost there.

Inert unless $GLASSHOUSE_CRASH_AT or $GLASSHOUSE_CRASH_LIST is set.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if $GLASSHOUSE_CRASH_AT asks for it here.

    The variable holds a name, or `name:k` for the k-th time (from 1) that the point is reached.
    If $GLASSHOUSE_CRASH_LIST names a file, every point reached is appended to it, one name a line.
    """
    crash_at = os.environ.get("GLASSHOUSE_CRASH_AT")
    crash_list = os.environ.get("GLASSHOUSE_CRASH_LIST")
    if crash_at is None and crash_list is None:
        return
    _reached[name] += 1
    if crash_list:
        with open(crash_list, "a", encoding="utf-8") as file:
            file.write(name + "\n")
    if crash_at in (name, f"{name}:{_reached[name]}"):
        os.kill(os.getpid(), signal.SIGKILL)
