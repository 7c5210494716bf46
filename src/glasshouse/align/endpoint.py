"""Any OpenAI-compatible endpoint as an engine, over the `openai` client (the extra ``[feedback]``).

The client sends one request at a time: retries, waiting, budget and cache are `calls.Caller`'s, so that they
are the same for every server, and what a server answers is looked at here, key by key, before it is used.
The access token is read from the environment and stands in no row, cache or message.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from glasshouse.align.calls import Again, Budget, Caller, Malformed, Patience, Reply, Request, Spent
from glasshouse.align.engines import Chat, EngineDown, Unreadable, seeds_for
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError

RETRIED = {408, 409, 425, 429}  # and every 5xx
NEVER = -30.0  # log-probability given to an option that a written letter rules out


class EndpointEngine:
    """A model behind a URL such as ``http://127.0.0.1:8000/v1``. Close it, or use it as a context manager.

    What is answered is remembered, so the model behind the URL must stay what it is. ``cache``: a file where
    every reply is kept, so that nothing is asked (or paid) twice, also not by a later process. ``key_env``
    names the environment variable with the access token. ``letters=True`` takes the letter that the model
    writes as its choice, for endpoints without log-probabilities. ``limit`` is what the server calls the
    number of tokens it may write. ``top``: how many alternatives to ask for (1 to 20).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: str | Path | None = None,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        budget: Budget | None = None,
        patience: Patience | None = None,
        timeout: float = 60.0,
        letters: bool = False,
        limit: str = "max_tokens",
        top: int = 20,
    ) -> None:
        _check(base_url, limit, top)
        self.base_url, self.model, self.letters = base_url.rstrip("/"), model, letters
        self._limit, self._top = limit, top
        self._openai = _package()
        self._client: Any = self._openai.OpenAI(
            base_url=self.base_url, api_key=os.environ.get(key_env) or "none", max_retries=0, timeout=timeout
        )
        self._key_env = key_env
        self._caller = Caller(
            self._send, self.digest, cache=cache, concurrency=concurrency, budget=budget, patience=patience
        )

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.model} at {self.base_url}"

    @property
    def digest(self) -> str:
        """Of URL and model name: the weights behind them cannot be seen."""
        return digest_of(["endpoint", self.base_url, self.model])

    @property
    def spent(self) -> Spent:
        """What was spent so far."""
        return self._caller.spent

    def write(
        self,
        prompts: Sequence[Chat],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Answers as text, `Unreadable` where the reply stayed so (``spent.malformed`` counts them).

        Whether ``seed`` is kept to is the server's affair. `EngineDown` and `BudgetSpent` as `Caller.ask`.
        """
        asked = [
            # 31 bits: servers refuse larger seeds.
            self._request(p, max_new_tokens, temperature) | {"seed": s % 2**31}
            for p, s in zip(prompts, seeds_for(prompts, seed), strict=True)
        ]
        replies = self._caller.ask(asked)
        return [str(reply["text"]).strip() if reply else Unreadable() for reply in replies]

    def choose(self, prompts: Sequence[Chat], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities [prompt][option], read from the alternatives to the first written token.

        An option that is not among them gets the least of those that are: more it cannot have. A reply with
        none of the options is unreadable: []. `UsageError` for an endpoint without log-probabilities.
        """
        more = {} if self.letters else {"logprobs": True, "top_logprobs": self._top}
        asked = [self._request(p, 4 if self.letters else 1, 0.0) | more for p in prompts]
        return [self._read(reply, options) if reply else [] for reply in self._caller.ask(asked)]

    def close(self) -> None:
        """Let go of the cache and of the connections."""
        self._caller.close()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Chat, new: int, temperature: float) -> Request:
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
        return {"model": self.model, "messages": messages, self._limit: new, "temperature": temperature}

    def _read(self, reply: Reply, options: Sequence[str]) -> list[float]:
        if self.letters:
            return _written(str(reply["text"]), options)
        if reply["top"] is None:
            raise UsageError(
                f"{self.name} gives no log-probabilities; use letters=True to take the letter that it writes"
            )
        return among(reply["top"], options)

    def _send(self, request: Request) -> Reply:
        """One exchange. `Again`, `Malformed`, or `EngineDown` for what waiting will not mend."""
        api = self._openai
        try:
            raw = self._client.chat.completions.with_raw_response.create(**request)
        except api.APIStatusError as error:
            status = error.status_code
            if status in RETRIED or status >= 500:
                why = (
                    f"{self.base_url} is rate-limited" if status == 429 else f"{self.base_url} gave {status}"
                )
                raise Again(why, retry_after(error.response.headers)) from error
            raise EngineDown(f"{self.base_url} refuses: {status}. {self._advice(status)}") from error
        except api.APIConnectionError as error:
            raise Again(f"{self.base_url} cannot be reached or does not answer in time") from error
        except (api.APIError, ValueError) as error:
            raise Malformed from error
        return parsed(raw.http_response.content)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"Put its access token into the environment variable {self._key_env}"
        if status == 404:
            return f"Is the URL right (most end in /v1), and has it a model called {self.model!r}?"
        return "It does not take such requests; see its log"


def parsed(body: bytes) -> Reply:
    """What a chat completion's body says: text, first token's alternatives, tokens used. Else `Malformed`."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"]["content"]
        used = (data.get("usage") or {}).get("total_tokens")
        top = _alternatives(choice.get("logprobs"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed from error
    if not isinstance(text, str):
        raise Malformed
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed from error
    return {"text": text, "top": top, "tokens": used if type(used) is int and used >= 0 else None}


def _alternatives(logprobs: Any) -> list[list[Any]] | None:
    """[[token, log-probability], ...] of the first written token; None where the reply has none."""
    if not logprobs or not logprobs.get("content"):
        return None
    rows = [[t["token"], float(t["logprob"])] for t in logprobs["content"][0]["top_logprobs"]]
    if any(not isinstance(token, str) or not math.isfinite(x) or x > 1e-3 for token, x in rows):
        raise ValueError("log-probabilities that are none")
    return rows or None


def among(top: Sequence[Sequence[Any]], options: Sequence[str]) -> list[float]:
    """Log-probabilities of options among a token's alternatives; [] when none of them is there.

    Alternatives are compared without blanks around them, so "A" and " A" count together.
    """
    found = [[x for token, x in top if str(token).strip() == option] for option in options]
    if not any(found):
        return []
    least = min(x for _, x in top)
    return [_logsumexp(xs) if xs else least for xs in found]


def _logsumexp(xs: Sequence[float]) -> float:
    top = max(xs)
    return top + math.log(sum(math.exp(x - top) for x in xs))


def _written(text: str, options: Sequence[str]) -> list[float]:
    """The written letter as a choice; [] unless the first word is exactly one of the options."""
    words = text.replace("(", " ").replace(")", " ").replace(".", " ").replace(":", " ").split()
    if not words or words[0] not in options:
        return []
    return [0.0 if option == words[0] else NEVER for option in options]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, sec. 10.2.3: a number or a date); None if it does not."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(said)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _check(base_url: str, limit: str, top: int) -> None:
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{base_url!r} is no endpoint; write it as http://host:port/v1")
    if parts.username or parts.password or parts.query:
        raise UsageError("put no password into the endpoint's URL; it would stand in every row")
    if limit not in ("max_tokens", "max_completion_tokens"):
        raise UsageError(f"limit must be 'max_tokens' or 'max_completion_tokens', not {limit!r}")
    if not 1 <= top <= 20:
        raise UsageError(f"top must be 1 to 20 alternatives, not {top}")


def _package() -> ModuleType:
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            "asking an endpoint needs the openai package: pip install 'glasshouse-lm[feedback]'"
        ) from error
    return openai
