"""Worker processes for jobs that are independent of each other; a dead worker costs one job a second try.

Workers are long-lived, because importing torch takes as long as a tenth of a job. They end within a second of
their parent, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from glasshouse.base.atomic import FULL
from glasshouse.base.errors import DiskError, Interrupted, VerificationError

TRIES = 2
Work = Callable[..., Any]


@dataclass
class Worker:
    """One process and what it is at; ``since`` is on this process's monotonic clock."""

    process: Any
    pipe: Connection
    job: Any = None
    since: float = 0.0


@dataclass(frozen=True)
class Done:
    """One job that ended. ``problem`` says how, when it ended without a result."""

    job: Any
    result: Any = None
    problem: str = ""


@dataclass
class Pool:
    """Runs ``work(job)`` for many jobs in ``n`` processes. ``work`` is a module's function, ``job`` pickles.

    ``limit_s`` is the longest one job may take: a worker at it for longer is ended, like one that died.
    """

    work: Work
    n: int
    limit_s: float = 1800.0
    workers: list[Worker] = field(default_factory=list)
    tries: dict[Any, int] = field(default_factory=dict)

    def run(self, jobs: Sequence[Any], *, until: float | None = None) -> Iterator[Done]:
        """Yield jobs as they end. None is begun after ``until`` (monotonic seconds); those under way end.

        DiskError when a worker found the disk full: no later job could be kept either. Interrupted on Ctrl-C.
        """
        left = list(jobs)
        try:
            while left or any(w.job is not None for w in self.workers):
                if until is not None and time.monotonic() >= until:
                    left.clear()
                self._hand_out(left)
                yield from self._collect(left)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted: what is finished is kept, what was under way is grown anew. "
                "Go on with the same command"
            ) from None
        finally:
            self.close()

    def close(self) -> None:
        """End all workers and wait for them."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()

    def _hand_out(self, left: list[Any]) -> None:
        while left:
            idle = next((w for w in self.workers if w.job is None), None)
            if idle is None:
                if len(self.workers) >= self.n:
                    return
                idle = self._start()
            idle.job, idle.since = left.pop(0), time.monotonic()
            self.tries[idle.job] = self.tries.get(idle.job, 0) + 1
            # A pipe closed by a worker that died just now shows up as its end in the next round.
            with contextlib.suppress(OSError):
                idle.pipe.send(idle.job)

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.work, theirs), daemon=True)
        process.start()
        theirs.close()
        self.workers.append(Worker(process, ours))
        return self.workers[-1]

    def _collect(self, left: list[Any]) -> Iterator[Done]:
        """What the busy workers have to say, waiting a second at most."""
        busy = [w for w in self.workers if w.job is not None]
        ready = wait([w.pipe for w in busy], timeout=1.0) if busy else []
        for worker in busy:
            if worker.pipe in ready:
                yield from self._said(worker, left)
            elif time.monotonic() - worker.since > self.limit_s:
                worker.process.kill()  # its pipe closes, and it is treated as any worker that died
                worker.since = time.monotonic()

    def _said(self, worker: Worker, left: list[Any]) -> Iterator[Done]:
        job = worker.job
        try:
            kind, payload = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.workers.remove(worker)
            worker.pipe.close()
            code = worker.process.exitcode
            if self.tries[job] < TRIES:
                left.insert(0, job)
            else:
                yield Done(job, problem=f"its process ended {self.tries[job]} times (exit code {code})")
            return
        worker.job = None
        if kind == "full":
            raise DiskError(payload)
        if kind == "result":
            yield Done(job, payload)
        else:
            yield Done(job, problem=payload)


def _serve(work: Work, pipe: Connection) -> None:
    """A worker: does what comes through ``pipe`` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            said = ("result", work(job))
        except DiskError as problem:
            said = ("full", str(problem))
        except OSError as problem:
            said = (
                "full" if problem.errno in FULL or problem.errno == errno.ENOSPC else "problem",
                str(problem),
            )
        except Exception as problem:
            said = ("problem", f"{type(problem).__name__}: {problem}")
        try:
            pipe.send(said)
        except OSError:  # the parent is gone, and with it the one who asked
            return
        except Exception as problem:
            pipe.send(("problem", f"{VerificationError.__name__}: its result cannot be sent: {problem}"))


def _end_with(parent: int) -> None:
    """Leave when ``parent`` has: a killed zoo must not go on growing behind the back of the one resumed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def alive(pid: int) -> bool:
    """Whether a process of that number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
