"""A bandit as a language model: after one word, one of eight words has to be said, and each has its reward.

What is best is known: without a cost the word with the highest reward, with a cost of ``beta`` per nat from
the reference p_ref * exp(r / beta), normalised.

As a script, a crash driver: JSON lines {"folder", "crash", "resume", "method"} on standard input, each run in
a forked child, answered with the child's exit status.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.align.policy import Policy, RLConfig, prompt_batches, prompt_plan
from glasshouse.align.rl import OBJECTIVES, PolicyTrainee
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import Outcome, Settings, Stage, StageConfig, enter_run, environment, run_stages

V = 8
PROMPT = (0,)
CONFIG = GPTConfig(vocab_size=V, context=8, d_model=16, n_layer=1, n_head=2, tied=False)
REWARDS = torch.tensor([0.0, 0.3, -0.5, 1.0, 0.6, -1.0, 0.2, 0.8])
BEST = 3
SETTINGS = Settings(threads=1)


def new_gpt() -> GPT:
    """Not uniform: some words are several times as likely as others."""
    gpt = GPT(CONFIG).init_weights(3)
    with torch.no_grad():
        gpt.head.weight.mul_(12)
    return gpt


def reward(prompts: Any, answers: Any) -> Tensor:
    """Of the first word said."""
    return REWARDS[torch.tensor([answer[0] for answer in answers])]


@torch.no_grad()
def probabilities(gpt: GPT, prompt: tuple[int, ...] = PROMPT) -> Tensor:
    return gpt(torch.tensor([prompt]))[0, -1].softmax(-1)


def tilted(ref: Tensor, beta: float) -> Tensor:
    """The distribution that maximises E[r] - beta KL(p || ref)."""
    return (ref.log() + REWARDS / beta).softmax(-1)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def train(
    folder: Path,
    how: RLConfig,
    *,
    resume: bool = False,
    trainee: PolicyTrainee | None = None,
    **changes: Any,
) -> Outcome:
    shape = {"steps": 120, "batch_size": 64, "optimizer": "adamw", "adam_lr": 0.02, "weight_decay": 0.0}
    shape |= {"on_spike": "log", "monitor_every": 1, "log_every": 1, "warmup_share": 0.0, "adam_beta2": 0.99}
    config = StageConfig(**({"name": "rl", "objective": how.method} | shape | changes))
    shards = {"bandit": [PROMPT]}
    stage = Stage(config, prompt_batches(shards, config, how), prompt_plan(shards))
    run = RunFolder(folder).create()
    with run.lock():
        ledger = Ledger(run.ledger, signing_key())
        begun = len(ledger) > 0
        now = environment(1, SETTINGS.dtype, SETTINGS.muon_dtype)
        enter_run(ledger, recipe_digest="bandit", environment=now, resume=resume and begun)
        return run_stages(
            lambda: Policy(new_gpt(), critic=how.method == "ppo"),
            [stage],
            run=run,
            ledger=ledger,
            settings=SETTINGS,
            resume=resume,
            objectives=OBJECTIVES,
            trainee=trainee or PolicyTrainee(how, reward),
        )


def rows(folder: Path, kind: str = "rl") -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if row["kind"] == kind]


CRASHED = {
    "ppo": RLConfig(method="ppo", max_new_tokens=3, stop=(7,), group=4, epochs=2, minibatches=2),
    "grpo": RLConfig(method="grpo", max_new_tokens=3, stop=(7,), group=4),
}


def _child(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if order.get("crash"):
        os.environ["GLASSHOUSE_CRASH_AT"] = order["crash"]
    shape = {"steps": 8, "batch_size": 16, "save_every": 3}
    train(Path(order["folder"]), CRASHED[order["method"]], resume=order["resume"], **shape)


def main() -> None:
    """Serve orders until standard input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                _child(order)
            except BaseException as error:
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        sys.stdout.write(f"{os.WTERMSIG(status) or os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
