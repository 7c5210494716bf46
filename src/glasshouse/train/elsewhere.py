"""A gate asked in another process, so that training goes on while it judges.

A gate is a pure function of a saved checkpoint and its history, so where it runs changes no verdict: the
worker loads the checkpoint from disk, with as many threads as a gate in this process has. It is spawned, not
forked (a fork of a process with threads may hang), serves one run, and ends with it.

A worker that dies has judged nothing: its answer is a hold that says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from glasshouse.train.gate import Checkpoint, Decision, Gate, GateRecord, ask

GateMaker = Callable[[], Gate]
Order = tuple[Checkpoint, tuple[GateRecord, ...], Collection[str], Path]


class Elsewhere:
    """One question at a time to a gate that ``make()`` makes in a process of its own.

    ``make`` must be picklable: a function of a module, a `functools.partial` of one, or an object.
    """

    def __init__(self, make: GateMaker, threads: int):
        self.make, self.threads = make, threads
        self.process: BaseProcess | None = None
        self.line: Connection | None = None
        self.asked: str | None = None  # the checkpoint that is being judged

    def ask(
        self,
        checkpoint: Checkpoint,
        history: tuple[GateRecord, ...],
        known_shards: Collection[str],
        run: Path,
    ) -> None:
        """Put the question; `answer` has what comes of it."""
        if self.process is None or not self.process.is_alive():
            self._start()
        assert self.line is not None
        self.asked = checkpoint.name
        with contextlib.suppress(OSError):  # it died before it was asked; the answer will say so
            self.line.send((checkpoint, history, frozenset(known_shards), run))

    def ready(self) -> bool:
        """Whether `answer` would come at once."""
        return self.line is not None and self.line.poll()  # a closed line is ready too: its end is the answer

    def answer(self) -> tuple[Decision, float]:
        """Wait for the decision, and the seconds that it took."""
        assert self.line is not None
        name, self.asked = self.asked, None
        try:
            decided: tuple[Decision, float] = self.line.recv()
            return decided
        except (EOFError, OSError):
            code = self._ended()
            return Decision("hold", f"error: the process that judged {name} died ({code})"), 0.0

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self._ended()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.make, self.threads), name="gate", daemon=True
        )
        self.process.start()
        theirs.close()  # so that its death closes the line

    def _ended(self) -> str:
        """Take leave of a process that is ending; say how it ended."""
        assert self.process is not None
        self.process.join()
        code = self.process.exitcode
        if self.line is not None:
            self.line.close()
        self.process, self.line = None, None
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def serve(line: Connection, make: GateMaker, threads: int) -> None:
    """The worker: make the gate once, then answer until the line is closed or the run's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the run decides what then
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    torch.set_num_threads(threads)
    gate: Gate | None = None

    def judge(checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        nonlocal gate
        gate = gate or make()  # within `ask`, which turns what it raises into a hold
        return gate(checkpoint, history, final)

    while True:
        try:
            checkpoint, history, known_shards, run = line.recv()
        except EOFError:
            return
        started = time.perf_counter()
        decision = ask(judge, checkpoint, history, False, known_shards, run)
        torch.set_num_threads(threads)  # a gate may have changed it
        line.send((decision, round(time.perf_counter() - started, 3)))


def _end_with_the_run() -> None:
    """A killed run cannot end its worker, which would judge on beside the one of the resumed run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
