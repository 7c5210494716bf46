"""A recipe of phases small enough for tests, and a judge behind a real server that goes by a rule."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from glasshouse.base.chain import read_entries
from glasshouse.recipes.schema import Recipe, load_recipe

SMALL = (
    *('precision="fp32"', "threads=1", 'compile="off"', 'device="cpu"'),
    *("data.workshop.shards=2", "data.workshop.documents=300", "data.workshop.validation=20"),
    *("data.workshop.strays=20", "tokenizer.vocab_size=500"),
    *("model.d_model=32", "model.n_layer=1", "model.n_head=2", "model.context=224"),
    *("align.made.red_team=100", "align.made.helpful=100", "align.revising.rounds=1"),
    *("align.revising.answer_tokens=5", "align.revising.critique_tokens=4", "align.revising.chunk=100"),
    *("align.judging.thought=false", "align.judging.principles=1", "align.judging.chunk=64", "align.pairs=4"),
    *(
        "align.reward.stage.steps=100",
        "align.reward.stage.batch_size=32",
        "align.reward.stage.adam_lr=0.005",
        "align.reward.held_out=0.4",
    ),
    *("align.policy.rl.max_new_tokens=5", "align.policy.rl.group=4"),
    *("stage.pretrain.steps=2", "stage.pretrain.batch_size=2", "stage.midtrain.steps=2"),
    *("stage.midtrain.batch_size=2", "stage.helpful.steps=20", "stage.helpful.batch_size=16"),
    *("stage.helpful.gate_every=20", "stage.constitution.steps=4", "stage.constitution.batch_size=8"),
    *(
        "stage.constitution.gate_every=4",
        "stage.rl.steps=4",
        "stage.rl.batch_size=8",
        "stage.rl.gate_every=2",
    ),
)


def small(*more: str, constraints: bool = True) -> Recipe:
    """The packaged recipe, made small."""
    with as_file(files("glasshouse.recipes") / "files" / "constitutional.toml") as path:
        recipe = load_recipe(path, [*SMALL, *more])
    return recipe if constraints else recipe.model_copy(update={"constraint": ()})


def entries(run: Path, kind: str) -> list[dict[str, Any]]:
    """Bodies of a ledger's entries of a kind."""
    return [e["body"] for e in read_entries(run / "ledger.jsonl") if e["kind"] == kind]


def shorter(a: str, b: str) -> float:
    """Logit of A: the shorter answer is the better one."""
    return 4.0 * math.tanh((len(b) - len(a)) / 8)


@contextlib.contextmanager
def judge_at(rule: Callable[[str, str], float] = shorter) -> Iterator[tuple[str, list[int]]]:
    """A server on loopback that compares by ``rule``: its URL, and how many questions it answered."""
    asked = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = " ".join(body["messages"][-1]["content"].split())
            found = re.search(r" A: (.*?) (?:Answer )?B: (.*?) Which", text)
            assert found is not None
            asked[0] += 1
            z = rule(found[1], found[2])
            logps = {"A": -math.log1p(math.exp(-z)), "B": -math.log1p(math.exp(z))}
            top = [{"token": t, "logprob": p, "bytes": None} for t, p in logps.items()]
            token = {"token": "A", "logprob": logps["A"], "bytes": None, "top_logprobs": top}
            message = {"role": "assistant", "content": "A"}
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": message,
                "logprobs": {"content": [token]},
            }
            usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
            made = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            data = json.dumps(made | {"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
