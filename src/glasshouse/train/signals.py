"""Ctrl-C and SIGTERM: finish the step, save, and leave; a second one leaves at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Signals:
    """While entered, the first SIGINT or SIGTERM sets ``asked``; a second one raises KeyboardInterrupt.

    Inside ``leaving_at_once()`` (a gate, which is simply asked again) the first one raises too. Outside the
    main thread Python allows no handlers, and signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Within the block nothing needs to be finished first: a signal raises KeyboardInterrupt."""
        self._at_once = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self._at_once:
            raise KeyboardInterrupt
