"""A small server in the OpenAI form with a real model behind it: a process of its own, on loopback alone.

`python -m align.judge_server PORT` prints "ready PORT" when it listens. It stops when its standard input is
closed (its parent ended) and in any case after five minutes. `POST /control {"mode", "n"}` tells how to
behave:

    ok                     answers
    rate N                 the next N requests get 429 with Retry-After: 0.2
    garbage N              the next N requests get text that is no completion (N < 0: all)
    prose                  answers in words, with log-probabilities of other tokens
    die N                  the process exits after N more answers
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from align.judges import TOK, letters
from glasshouse.align.local import LocalEngine
from glasshouse.model.generate import generate

TOKEN = "let-me-in"
torch.set_num_threads(1)


class State:
    mode, n, served, refused = "ok", 0, 0, 0
    lock = threading.Lock()
    engine = LocalEngine(letters(), TOK)


def complete(asked: dict[str, Any]) -> dict[str, Any]:
    prompt = State.engine.ids(asked["messages"])
    top = asked.get("top_logprobs", 0) if asked.get("logprobs") else 0
    made = generate(
        State.engine.decoder,
        [prompt],
        asked["max_tokens"],
        stop=State.engine.chat.stop,
        temperature=asked.get("temperature", 1.0),
        seeds=[asked.get("seed", 0)],
        return_logprobs=True,
        top_logprobs=top,
        vocab=TOK.vocab_size,
    )[0]
    text = TOK.decode(made.ids)
    rows = [
        {
            **{"token": TOK.decode([i]), "logprob": logp, "bytes": None},
            "top_logprobs": [{"token": TOK.decode([t]), "logprob": x, "bytes": None} for t, x in best],
        }
        for i, logp, best in zip(made.ids, made.logprobs or [], made.top or [[]] * len(made.ids), strict=True)
    ]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    used = {"prompt_tokens": len(prompt), "completion_tokens": len(made.ids)}
    return {
        **{"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"]},
        "choices": [choice | ({"logprobs": {"content": rows}} if top else {})],
        "usage": used | {"total_tokens": sum(used.values())},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(200, {"served": State.served, "refused": State.refused})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            State.mode, State.n = body["mode"], body.get("n", 0)
            return self.reply(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": {"message": "no token"}})
        if self.path != "/v1/chat/completions":
            return self.reply(404, {"error": {"message": "no such path"}})
        with State.lock:  # one model, one request at a time
            return self.behave(body)

    def behave(self, body: dict[str, Any]) -> None:
        if State.mode in ("rate", "garbage") and State.n != 0:
            State.n -= 1
            State.refused += 1
            if State.mode == "rate":
                return self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})
            return self.send(200, b"<html>the cat sat on the model</html>", {})
        if State.mode == "die":
            if State.n == 0:
                os._exit(9)
            State.n -= 1
        State.served += 1
        made = complete(body)
        if State.mode == "prose":
            made["choices"][0]["message"]["content"] = "It depends."
            made["choices"][0]["logprobs"] = {
                "content": [
                    {"token": "It", "logprob": 0.0, "top_logprobs": [{"token": "It", "logprob": 0.0}]}
                ]
            }
        return self.reply(200, made)

    def reply(self, status: int, data: Any, more: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(data).encode(), more or {}, "application/json")

    def send(self, status: int, body: bytes, more: dict[str, str], kind: str = "text/html") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def main() -> None:
    threading.Timer(300, os._exit, (0,)).start()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    sys.stdout.write(f"ready {server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
