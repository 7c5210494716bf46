"""A real server process on loopback is asked like any other engine, and may fail like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from align.judges import asked, constitution, fingerprint, judge, pairs
from glasshouse.align.calls import Budget, Patience
from glasshouse.align.endpoint import EndpointEngine, among, parsed, retry_after
from glasshouse.align.engines import BudgetSpent, EngineDown
from glasshouse.align.feedback import Judging, feedback, preferences
from glasshouse.align.position import JudgeUnreadable
from glasshouse.align.revise import Revising, job_rows, revise
from glasshouse.align.rows import read_rows
from glasshouse.base.errors import UsageError

TESTS = Path(__file__).resolve().parents[1]
TOKEN = "let-me-in"
HASTY = Patience(retries=3, first=0.02, longest=0.1)
HOW = Judging(position_limit=1.0, chunk=4)  # the small model leans one way or the other; not the point here


class Server:
    """The process of `judge_server`; it ends with this one, or after five minutes."""

    def __init__(self, port: int = 0) -> None:
        env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "align.judge_server", str(port)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        assert said[:1] == ["ready"], "the server did not start"
        self.port = int(said[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def control(self, mode: str, n: int = 0) -> None:
        body = json.dumps({"mode": mode, "n": n}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/control", body)
        urllib.request.urlopen(request, timeout=10).read()

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=10) as reply:
            found: dict[str, int] = json.loads(reply.read())
        return found

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    running.control("ok")
    return running


def engine(server: Server, **more: Any) -> EndpointEngine:
    return EndpointEngine(server.url, "tiny", **{"patience": HASTY, "concurrency": 4, **more})


def test_a_model_behind_an_endpoint_judges_and_writes_as_it_does_here(server: Server, tmp_path: Path) -> None:
    prompts = [
        [*asked(f"Choose. {w} Which of the two answers is the one to choose? A or B alone.")]
        for w in "abcdef"
    ]
    local = judge()
    with engine(server) as there:
        for ours, theirs in zip(
            local.choose(prompts, ["A", "B"]),  # type: ignore[arg-type]
            there.choose(prompts, ["A", "B"]),  # type: ignore[arg-type]
            strict=True,
        ):
            assert theirs == pytest.approx(ours, abs=1e-4)
        seeds = list(range(6))
        assert there.write(prompts, 6, 1.0, seeds) == local.write(prompts, 6, 1.0, seeds)  # type: ignore[arg-type]
        feedback(pairs(6), constitution(), there, tmp_path / "there", HOW)
    feedback(pairs(6), constitution(), local, tmp_path / "here", HOW)
    there_rows, here_rows = (preferences(tmp_path / name, position_limit=1) for name in ("there", "here"))
    # Other digests draw other principles, so the rows are compared by what was asked alone.
    assert [r["prompt"] for r in there_rows] == [r["prompt"] for r in here_rows] and len(here_rows) == 6


def test_nothing_is_asked_twice_also_by_a_later_process(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    before = server.counts()["served"]
    with engine(server, cache=cache) as there:
        feedback(pairs(5), constitution(), there, tmp_path / "one", HOW)
        assert (there.spent.calls, there.spent.cached) == (10, 0) and there.spent.tokens > 0
        tokens = there.spent.tokens
    with engine(server, cache=cache) as there:
        feedback(pairs(5), constitution(), there, tmp_path / "two", HOW)
        assert (there.spent.calls, there.spent.cached, there.spent.tokens) == (10, 10, tokens)
    assert server.counts()["served"] - before == 10
    assert fingerprint(read_rows(tmp_path / "one")) == fingerprint(read_rows(tmp_path / "two"))
    for path in (cache, tmp_path / "one"):
        assert TOKEN not in path.read_text()


def test_a_rate_limit_is_waited_out_as_long_as_the_server_asks(server: Server, tmp_path: Path) -> None:
    server.control("rate", 2)
    begun = time.monotonic()
    with engine(server, concurrency=1) as there:
        feedback(pairs(2), constitution(), there, tmp_path / "r", HOW)
        assert there.spent.retried == 2 and there.spent.calls == 4 and there.spent.waited >= 0.4
    assert time.monotonic() - begun >= 0.4 and len(read_rows(tmp_path / "r")) == 2


def test_a_server_that_asks_for_too_much_patience_is_a_clear_state(server: Server) -> None:
    server.control("rate", 50)
    with engine(server, patience=Patience(retries=3, longest_asked=0.1)) as there:
        with pytest.raises(EngineDown, match=r"rate-limited; the server asks to wait 0 s, longer than"):
            there.choose([asked("A or B?")], ["A", "B"])  # type: ignore[list-item]
    server.control("rate", 50)
    with engine(server) as there, pytest.raises(EngineDown, match="rate-limited, 4 times in a row"):
        there.choose([asked("A or B?")], ["A", "B"])  # type: ignore[list-item]


def test_a_server_that_goes_down_half_way_loses_nothing_and_the_same_command_completes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    first = Server()
    first.control("die", 13)
    cache, path = tmp_path / "cache", tmp_path / "rows"
    with engine(first, cache=cache) as there, pytest.raises(EngineDown, match="cannot be reached"):
        feedback(pairs(12), constitution(), there, path, HOW)
    assert first.process.wait(timeout=10) == 9
    first.stop()
    assert len(read_rows(cache)) == 13  # everything that was answered
    assert len(read_rows(path)) == 4  # one whole chunk of pairs
    again = Server(first.port)
    with engine(again, cache=cache) as there:
        found = feedback(pairs(12), constitution(), there, path, HOW)
        assert found.states["ok"] == 12 and again.counts()["served"] == 24 - 13
        feedback(pairs(12), constitution(), there, tmp_path / "whole", HOW)
    again.stop()
    assert fingerprint(read_rows(path)) == fingerprint(read_rows(tmp_path / "whole"))


def test_text_that_is_no_completion_is_asked_for_again_then_counted(server: Server, tmp_path: Path) -> None:
    server.control("garbage", 2)
    with engine(server, concurrency=1) as there:
        found = feedback(pairs(2), constitution(), there, tmp_path / "r", HOW)
        assert found.states["malformed"] == 0 and there.spent.retried == 2
    server.control("garbage", 3)
    with engine(server, concurrency=1) as there:
        found = feedback(pairs(3), constitution(), there, tmp_path / "s", HOW)
        assert found.states["malformed"] == 1 and there.spent.malformed == 1
        found = feedback(pairs(3), constitution(), there, tmp_path / "s", HOW)
        assert found.states == {"ok": 3, "tied": 0, "malformed": 0, "same": 0, "empty": 0}
    server.control("garbage", -1)
    with engine(server) as there, pytest.raises(JudgeUnreadable, match="no readable judgement"):
        feedback(pairs(8), constitution(), there, tmp_path / "t", HOW.model_copy(update={"pilot": 8}))


def test_a_revision_whose_reply_was_no_completion_is_asked_for_again_by_the_next_run(
    server: Server, tmp_path: Path
) -> None:
    """An answer and a critique are spoilt; what comes out at last is as if none had been."""
    asks, zero, one = (
        ["How do I warm the egg?", "How do I soak the map?"],
        Revising(rounds=0, answer_tokens=12, critique_tokens=12),
        Revising(rounds=1, answer_tokens=12, critique_tokens=12),
    )
    with engine(server, concurrency=1) as there:
        clean = revise(asks, constitution(), there, tmp_path / "clean", one)
    path = tmp_path / "rows"
    with engine(server, concurrency=1) as there:
        server.control("garbage", 3)
        found = revise(asks, constitution(), there, path, zero)
        assert (found.answers, found.empty_answers, found.malformed) == (1, 0, 1)
        assert revise(asks, constitution(), there, path, zero).malformed == 0
        server.control("garbage", 3)
        found = revise(asks, constitution(), there, path, one)  # the first critique
        assert found.malformed == 1 and sum(found.revisions.values()) == 1
        assert "malformed" not in found.revisions and all(
            "malformed" not in b for b in found.by_principle.values()
        )
    server.control("ok")
    with engine(server, concurrency=1) as there:
        found = revise(asks, constitution(), there, path, one)
    assert found.malformed == 0 and found.revisions == clean.revisions
    chains = [{r["key"]: r["text"] for r in job_rows(p)} for p in (path, tmp_path / "clean")]
    assert chains[0] == chains[1]
    assert sum("instead_of" in r for r in read_rows(path)) == 2


def test_an_answer_in_words_is_no_choice(server: Server) -> None:
    server.control("prose")
    with engine(server) as there:
        assert there.choose([asked("A or B?")], ["A", "B"]) == [[]]  # type: ignore[list-item]
    with engine(server, letters=True) as there:
        assert there.choose([asked("A or B?")], ["A", "B"]) == [[]]  # type: ignore[list-item]
        server.control("ok")
        found = there.choose([asked("Reply with the letter A or B alone.")], ["A", "B"])  # type: ignore[list-item]
    assert found in ([[]], [[0.0, -30.0]], [[-30.0, 0.0]])


@pytest.mark.parametrize("budget", [Budget(calls=5), Budget(tokens=900)])
def test_a_spent_budget_is_a_clear_state_and_a_larger_one_goes_on(
    server: Server, tmp_path: Path, budget: Budget
) -> None:
    cache, path = tmp_path / "cache", tmp_path / "rows"
    with engine(server, cache=cache, budget=budget) as there:
        with pytest.raises(BudgetSpent, match=r"budget of \d+ (calls|tokens) is spent.*larger budget"):
            feedback(pairs(8), constitution(), there, path, HOW)
        bought = there.spent.calls
        assert 0 < bought < 16 and len(read_rows(cache)) == bought
        assert budget.tokens is None or there.spent.tokens <= budget.tokens
    with engine(server, cache=cache, budget=budget) as there, pytest.raises(BudgetSpent):
        feedback(pairs(8), constitution(), there, path, HOW)  # what was spent is remembered
    with engine(server, cache=cache) as there:
        assert feedback(pairs(8), constitution(), there, path, HOW).states["ok"] == 8
        assert there.spent.calls == 16


def test_a_refusal_says_what_to_do_and_is_not_repeated(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with engine(server) as there, pytest.raises(EngineDown, match="401.*OPENAI_API_KEY") as error:
        there.choose([asked("A or B?")], ["A", "B"])  # type: ignore[list-item]
    assert "wrong" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    wrong = EndpointEngine(server.url.removesuffix("/v1"), "tiny", patience=HASTY)
    with wrong, pytest.raises(EngineDown, match="404.*most end in /v1"):
        wrong.write([asked("Hello")], 4)  # type: ignore[list-item]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"glasshouse-lm\[feedback\]"):
        EndpointEngine("http://127.0.0.1:9/v1", "tiny")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://me:secret@127.0.0.1/v1"])
def test_a_url_that_is_none_or_holds_a_password_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="endpoint") as error:
        EndpointEngine(url, "tiny")
    assert "secret" not in str(error.value)


# -- reading what servers say -------------------------------------------------------------------------------


def test_options_are_read_with_and_without_a_blank_and_a_missing_one_gets_the_least() -> None:
    import math

    top = [["A", math.log(0.5)], [" A", math.log(0.2)], ["B", math.log(0.1)], ["x", math.log(0.05)]]
    assert among(top, ["A", "B"]) == pytest.approx([math.log(0.7), math.log(0.1)])
    assert among(top, ["A", "C"]) == pytest.approx([math.log(0.7), math.log(0.05)])
    assert among(top, ["C", "D"]) == []


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"\xff"),
        *(b'{"choices": [{"message": {"content": null}}]}', b'{"choices": [{"message": {"content": 3}}]}'),
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices":[{"message":{"content":"A"},"logprobs":{"content":[{"top_logprobs":[{"token":"A"}]}]}}]}',
        b'{"choices":[{"message":{"content":"A"},"logprobs":{"content":[{"top_logprobs":[{"token":"A",'
        b'"logprob":NaN}]}]}}]}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_completion_is_malformed(body: bytes) -> None:
    from glasshouse.align.calls import Malformed

    with pytest.raises(Malformed):
        parsed(body)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5 and retry_after({}) is None
    assert retry_after({"retry-after": "-3"}) == 0 and retry_after({"retry-after": "soon"}) is None
    found = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert found is not None and 27 <= found <= 31


def test_waits_double_up_to_a_limit_and_callers_part_ways() -> None:
    patience = Patience(first=1.0, longest=10.0)
    for attempt, whole in enumerate((1, 2, 4, 8, 10, 10)):
        waits = [patience.wait(f"key {k}", attempt, None) for k in range(50)]
        assert whole / 2 <= min(waits) < max(waits) < whole and len(set(waits)) == 50
    assert 7.0 <= patience.wait("key", 0, 7.0) < 7.1
