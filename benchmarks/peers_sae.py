"""Trainers of sparse autoencoders as peers ship them, each in a process and an environment of its own.

Run as a worker by `bench_sae.py` with the python of that environment; imports nothing of Glasshouse. Each
contestant makes the steps that its package's own trainer makes, in that order, with that trainer's optimiser;
left out are data loaders, progress bars and logging.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toy_features import D_IN, Toy

D_SAE, K, BATCH = 4096, 32, 4096
AUXILIARY = 1 / 32
NEVER = -1e3  # a bias with which no feature fires
WARMUP_STEPS = 10  # of the learning rate, then constant: the same for everybody


@dataclass(frozen=True)
class Contestant:
    """``step(i, x)`` is update ``i`` on activations x [n, D_IN]; ``decoder()`` its rows [D_SAE, D_IN];
    ``kill(n)`` keeps the first ``n`` features from firing and lets the next step take them for dead.
    """

    step: Callable[[int, Tensor], None]
    decoder: Callable[[], Tensor]
    kill: Callable[[int], None]


def sparsify(lr: float, seed: int, optimizer: str) -> Contestant:
    """EleutherAI's, in the order of `Trainer.fit`; its default optimiser is schedule-free signum."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    torch.manual_seed(seed)
    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K), dtype=torch.float32)
    silent = torch.zeros(D_SAE, dtype=torch.long)
    fired = torch.zeros(D_SAE, dtype=torch.bool)
    opt: Any
    if optimizer == "adam":
        opt = torch.optim.Adam(sae.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1.0, (i + 1) / WARMUP_STEPS))
    else:
        opt, schedule = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95), None
        opt.train()

    def step(i: int, x: Tensor) -> None:
        if i == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent > 10_000_000)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + AUXILIARY * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
        if schedule is not None:
            schedule.step()
        silent.add_(len(x))
        silent[fired] = 0
        fired.zero_()

    def decoder() -> Tensor:
        if schedule is not None:
            return sae.W_dec.detach()
        opt.eval()
        rows = sae.W_dec.detach().clone()
        opt.train()
        return rows

    def kill(n: int) -> None:
        sae.encoder.bias.data[:n], silent[:n] = NEVER, 10**9

    return Contestant(step, decoder, kill)


def saelens(lr: float, seed: int, autocast: bool) -> Contestant:
    """SAELens's `SAETrainer.step`."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=WARMUP_STEPS,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(i: int, x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def kill(n: int) -> None:
        sae.b_enc.data[:n] = NEVER
        trainer.n_forward_passes_since_fired[:n] = config.dead_feature_window + 1

    return Contestant(step, lambda: sae.W_dec.detach(), kill)


def dictionary_learning(lr: float, seed: int) -> Contestant:
    """dictionary_learning's `TopKTrainer.update`."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=D_IN,
        dict_size=D_SAE,
        k=K,
        layer=0,
        lm_name="toy",
        lr=lr,
        auxk_alpha=AUXILIARY,
        warmup_steps=WARMUP_STEPS,
        seed=seed,
        device="cpu",
    )

    def kill(n: int) -> None:
        trainer.ae.encoder.bias.data[:n] = NEVER
        trainer.num_tokens_since_fired[:n] = 10**9

    return Contestant(
        lambda i, x: trainer.update(i, x) and None, lambda: trainer.ae.decoder.weight.T.detach(), kill
    )


def make(who: str, lr: float, seed: int, steps: int) -> Contestant:
    """A fresh contestant by name; none of these schedules depends on the number of steps."""
    match who:
        case "sparsify":
            return sparsify(lr, seed, "signum")
        case "sparsify, Adam":
            return sparsify(lr, seed, "adam")
        case "SAELens":
            return saelens(lr, seed, autocast=False)
        case "SAELens, autocast":
            return saelens(lr, seed, autocast=True)
        case "dictionary_learning":
            return dictionary_learning(lr, seed)
    raise SystemExit(f"no contestant {who!r}")


def serve(make: Callable[[str, float, int, int], Contestant], who: str) -> None:
    """Answer requests on standard input, a JSON object a line.

    {"lr", "seed", "dead", "steps"} starts afresh; "step": a step's seconds on the next batch;
    {"marks": steps, "data"}: trains on the toy and gives the share recovered after so many steps.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    toy = Toy(0, BATCH)
    batches = [toy(step) for step in range(4)]
    contestant, dead, i = make(who, 1e-3, 0, 10**6), 0, 0
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if request == "step":
            contestant.kill(dead)
            x = batches[i % len(batches)]
            began = time.perf_counter()
            contestant.step(i, x)
            answer, i = time.perf_counter() - began, i + 1
        elif "marks" in request:
            answer = learn(contestant, Toy(request["data"], BATCH), request["marks"])
        else:
            contestant = make(who, request["lr"], request["seed"], request["steps"])
            dead, i = request["dead"], 0
            answer = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def learn(contestant: Contestant, toy: Toy, marks: list[int]) -> list[float]:
    """The share of true features recovered after each number of steps in ``marks``, increasing."""
    shares = []
    for i in range(max(marks) + 1):
        if i in marks:
            shares.append(toy.recovered(contestant.decoder()))
        if i < max(marks):
            contestant.step(i, toy(i))
    return shares


def main() -> None:
    """Work for `bench_sae.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    serve(make, arguments.who)


if __name__ == "__main__":
    main()
