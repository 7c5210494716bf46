"""Calls to a server that may be slow, full, broken or dear: budget, patience, and a cache on disk.

Nothing here knows what is asked or answered: a `Caller` sends requests (JSON objects) through a function,
many at a time, and gives the replies in order. A reply that was paid for is on disk before all else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.align.engines import BudgetSpent, EngineDown
from glasshouse.align.rows import Row, Rows
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator

Request = dict[str, Any]
Reply = dict[str, Any]  # JSON; "tokens" is what the server says it cost, when it says so


class Again(Exception):
    """The server cannot answer now and may later: after ``wait`` seconds if it said so."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Malformed(Exception):
    """The server answered something that is no answer. It costs like one."""


@dataclass(frozen=True)
class Budget:
    """What may be spent over the life of the cache (of the engine where there is none); None: no limit."""

    calls: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Patience:
    """How long to put up with a server.

    The k-th wait is ``first`` x 2^k seconds, at most ``longest``, times a seeded factor in [0.5, 1) so that
    callers part ways; a Retry-After of the server's is honoured instead, up to ``longest_asked`` seconds.
    """

    retries: int = 6
    first: float = 0.5
    longest: float = 60.0
    longest_asked: float = 300.0
    malformed: int = 2  # times that a request is repeated after an unreadable answer

    def wait(self, key: str, attempt: int, asked: float | None) -> float:
        """Seconds to wait before attempt number ``attempt`` + 1."""
        jitter = float(generator("jitter", key, attempt).random())
        if asked is not None:
            return asked + 0.05 * jitter
        return min(self.longest, self.first * 2.0**attempt) * (0.5 + jitter / 2)


@dataclass
class Spent:
    """What was spent and suffered. ``calls`` and ``tokens`` include what the cache remembers."""

    calls: int = 0
    tokens: int = 0
    cached: int = 0  # requests answered from the cache, in this process
    retried: int = 0
    malformed: int = 0  # requests given up as unreadable
    waited: float = 0.0  # seconds, over all threads


class Caller:
    """Sends requests by ``send``, which raises `Again`, `Malformed` or a final error, some at once.

    ``scope`` is part of every cache key: the same request to another server or model is another one.
    """

    def __init__(
        self,
        send: Callable[[Request], Reply],
        scope: str,
        *,
        cache: str | Path | None = None,
        concurrency: int = 8,
        budget: Budget | None = None,
        patience: Patience | None = None,
    ) -> None:
        if concurrency < 1:
            raise UsageError(f"concurrency must be at least 1, not {concurrency}")
        self._send, self._scope, self._concurrency = send, scope, concurrency
        self.budget, self.patience = budget or Budget(), patience or Patience()
        self._rows = Rows(cache) if cache is not None else None
        self._known: dict[str, Reply] = {}
        self._lock, self._halt = threading.Lock(), threading.Event()
        self._reserved = 0  # estimated tokens of requests under way
        self._ratio = 1.0  # the most tokens that a request took for each that was estimated
        self.spent = Spent()
        for row in self._rows or ():
            self._known[row["key"]] = row["reply"]
            self.spent.calls += 1
            self.spent.tokens += row["tokens"]

    def close(self) -> None:
        """Let go of the cache file."""
        if self._rows is not None:
            self._rows.close()

    def ask(self, requests: Sequence[Request]) -> list[Reply | None]:
        """The replies in order, None for one that stayed unreadable.

        `EngineDown` when the server is down, refuses, or asks for more patience than there is; `BudgetSpent`
        when the budget is. What was answered before, also by requests then under way, is in the cache.
        """
        keys = [digest_of([self._scope, request]) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        self.spent.cached += sum(key in self._known for key in keys)
        if new:
            self._halt.clear()
            with ThreadPoolExecutor(min(self._concurrency, len(new))) as pool:
                under_way = {pool.submit(self._one, key, request): key for key, request in new.items()}
                self._gather(under_way, new)
        return [self._known.get(key) for key in keys]

    def _gather(self, under_way: dict[Future[Reply | None], str], requests: dict[str, Request]) -> None:
        """Keep every reply as it comes; at the first error stop the others and keep what still comes back."""
        kept: set[Future[Reply | None]] = set()
        try:
            for future in as_completed(under_way):
                kept.add(future)
                self._keep(under_way[future], requests[under_way[future]], future.result())
        except BaseException:
            self._halt.set()
            for future in under_way.keys() - kept:
                if not future.cancel() and future.exception() is None:
                    self._keep(under_way[future], requests[under_way[future]], future.result())
            raise

    def _keep(self, key: str, request: Request, reply: Reply | None) -> None:
        if reply is None:
            return
        row: Row = {"key": key, "request": request, "reply": reply, "tokens": _tokens(request, reply)}
        if self._rows is not None:
            self._rows.add(row)
        self._known[key] = reply

    def _one(self, key: str, request: Request) -> Reply | None:
        """One request, with as much patience as there is."""
        unreadable = 0
        for attempt in range(self.patience.retries + 1):
            estimate = self._reserve(request)
            asked: float | None = None
            try:
                reply = self._send(request)
            except Malformed:
                self._settle(estimate, estimate)
                unreadable += 1
                if unreadable > self.patience.malformed:
                    break
                why = "unreadable answers"
            except Again as again:
                self._settle(estimate, None)
                why, asked = str(again), again.wait
            except BaseException:
                self._settle(estimate, None)
                raise
            else:
                self._settle(estimate, _tokens(request, reply))
                return reply
            if attempt == self.patience.retries:
                raise EngineDown(
                    f"{why}, {attempt + 1} times in a row. What was answered is kept; run the same command "
                    "again when the server is well"
                )
            self._wait(key, attempt, asked, why)
        with self._lock:
            self.spent.malformed += 1
        return None

    def _wait(self, key: str, attempt: int, asked: float | None, why: str) -> None:
        if asked is not None and asked > self.patience.longest_asked:
            raise EngineDown(
                f"{why}; the server asks to wait {asked:.0f} s, longer than "
                f"{self.patience.longest_asked:.0f} s. What was answered is kept; run the same command later"
            )
        seconds = self.patience.wait(key, attempt, asked)
        begun = time.monotonic()
        stopped = self._halt.wait(seconds)
        with self._lock:
            self.spent.retried += 1
            self.spent.waited += time.monotonic() - begun
        if stopped:
            raise EngineDown("stopped while waiting, because another request failed")

    def _reserve(self, request: Request) -> int:
        """Take one call and the estimated tokens from the budget. `BudgetSpent` when they are not there."""
        calls, tokens = self.budget.calls, self.budget.tokens
        with self._lock:
            if self._halt.is_set():
                raise EngineDown("stopped, because another request failed")
            estimate = math.ceil(self._ratio * estimated_tokens(request))
            if calls is not None and self.spent.calls + 1 > calls:
                raise BudgetSpent(f"the budget of {calls} calls is spent{_GO_ON}")
            if tokens is not None and self.spent.tokens + self._reserved + estimate > tokens:
                raise BudgetSpent(
                    f"the budget of {tokens} tokens is spent: {self.spent.tokens} are used, {self._reserved} "
                    f"under way, and the next request may need {estimate}{_GO_ON}"
                )
            self.spent.calls += 1
            self._reserved += estimate
        return estimate

    def _settle(self, estimate: int, used: int | None) -> None:
        """Give the reserved tokens back and count what was used; None: there was no answer at all."""
        with self._lock:
            self._reserved -= estimate
            if used is None:
                self.spent.calls -= 1
            else:
                self.spent.tokens += used
                self._ratio *= max(1.0, used / max(estimate, 1))


_GO_ON = ". What was answered is kept; run the same command again with a larger budget"


def estimated_tokens(request: Request) -> int:
    """A request's tokens before it is sent: a quarter of its characters, and all that it may write."""
    said = sum(len(m["content"]) + 16 for m in request.get("messages", ()))
    written = request.get("max_tokens") or request.get("max_completion_tokens") or 0
    return said // 4 + int(written)


def _tokens(request: Request, reply: Reply) -> int:
    used = reply.get("tokens")
    return used if isinstance(used, int) else estimated_tokens(request)
