"""Work for worker processes in tests; a job is (folder, what to do)."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path


def work(job: tuple[str, str]) -> str:
    folder, what = Path(job[0]), job[1]
    with open(folder / "begun.txt", "a") as file:
        file.write(f"{what} {os.getpid()}\n")
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "dies once" and not (folder / "died").exists():
        (folder / "died").touch()
        os._exit(3)
    if what == "raises":
        raise ValueError("nothing grew")
    if what == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "sleeps":
        time.sleep(60)
    return what.upper()
