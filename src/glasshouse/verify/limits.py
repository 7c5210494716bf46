"""A wall limit on one check. What does not finish in time has shown nothing, and blocks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeUp(BaseException):
    """The limit was reached. Not an ``Exception``, so that no check can swallow it on its way."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeUp in the block once ``seconds`` have passed; None: no limit.

    In the main thread the block is stopped where it stands, between two operations of the interpreter; an
    alarm that somebody else has set goes on afterwards. In another thread, or where that alarm rings sooner,
    the block can only be told at its end that it was late.
    """
    if seconds is None:
        yield
        return
    started = time.monotonic()
    theirs = signal.getitimer(signal.ITIMER_REAL)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < theirs <= seconds:
        yield
    else:
        before = signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            left = max(theirs - (time.monotonic() - started), 1e-3) if theirs else 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, left)
    if time.monotonic() - started > seconds:
        raise TimeUp


def _ring(number: int, frame: FrameType | None) -> None:
    raise TimeUp
