"""Who samples a policy's answers: this process, worker processes, a served engine, or Ray, behind one
protocol.

An answer depends on its prompt, its seed and the weights alone, so all but a served engine draw the same
tokens, and a killed run samples them again. Answers are drawn from the policy itself: temperature 1, no
filters, because every estimator of a policy gradient and of a KL distance is about what was sampled.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from glasshouse.align.engines import Engine, Unreadable
from glasshouse.base.config import parse
from glasshouse.base.errors import UsageError
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.digest import weights_digest
from glasshouse.model.generate import Decoder, Generated, generate


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. ``stop``: token ids that end an answer; ``vocab``: the tokenizer's size."""

    max_new_tokens: int
    stop: tuple[int, ...] = ()
    vocab: int | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class Answer:
    """``ids`` with the stop token, if one ended it (``ended``). ``logprobs``: of each id under the policy
    that drew it, in nats; None where whoever drew it does not say.
    """

    ids: list[int]
    ended: bool
    logprobs: list[float] | None = None


class Rollouts(Protocol):
    """Draws answers from ``model`` as it is now."""

    def sample(
        self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
    ) -> list[Answer]:
        """One answer to each prompt, in order; equal arguments and weights give equal answers."""

    def close(self) -> None:
        """Let go of processes and connections."""


class Embedded:
    """In this process, with the KV-cached batched generator."""

    def sample(
        self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
    ) -> list[Answer]:
        return draw(model, prompts, seeds, how)

    def close(self) -> None:
        """Nothing to let go of."""


def draw(
    model: GPT | Decoder, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
) -> list[Answer]:
    """`Rollouts.sample` by the generator."""
    made = generate(
        model,
        prompts,
        how.max_new_tokens,
        stop=how.stop,
        temperature=1.0,
        seeds=seeds,
        return_logprobs=True,
        batch_size=how.batch_size,
        vocab=how.vocab,
    )
    return [_answer(one) for one in made]


def _answer(one: Generated) -> Answer:
    ids, logprobs = list(one.ids), list(one.logprobs or [])
    if isinstance(one.stopped_by, int) and one.stop_logprob is not None:
        ids, logprobs = [*ids, one.stopped_by], [*logprobs, one.stop_logprob]
    return Answer(ids, one.stopped, logprobs)


# -- worker processes --------------------------------------------------------------------------------------


class LocalWorkers:
    """``workers`` processes on this machine, each with ``threads`` threads; weights go through a file."""

    def __init__(self, workers: int, threads: int = 1):
        if workers < 1:
            raise UsageError(f"rollouts need at least one worker, not {workers}")
        self.workers = workers
        self._home = tempfile.TemporaryDirectory(prefix="glasshouse-rollouts-")
        self._pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )
        self._published: Path | None = None

    def sample(
        self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
    ) -> list[Answer]:
        """Every worker answers a share of the prompts, the longest dealt out first."""
        path = self._publish(model)
        config = model.config.model_dump(mode="json")
        shares = dealt(prompts, self.workers)
        jobs = [
            self._pool.submit(
                _work, str(path), config, [list(prompts[i]) for i in s], [seeds[i] for i in s], how
            )
            for s in shares
        ]
        return gathered(shares, [job.result() for job in jobs])

    def _publish(self, model: GPT) -> Path:
        path = Path(self._home.name) / f"{weights_digest(model)}.safetensors"
        if not path.exists():
            path.write_bytes(packed_weights(model))
            if self._published is not None:
                self._published.unlink(missing_ok=True)
            self._published = path
        return path

    def close(self) -> None:
        self._pool.shutdown()
        self._home.cleanup()


def dealt(prompts: Sequence[Sequence[int]], workers: int) -> list[list[int]]:
    """Indices of the prompts for each worker, so that no one has all the long ones; none is empty."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    return [share for k in range(workers) if (share := order[k::workers])]


def gathered(shares: Sequence[Sequence[int]], made: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The workers' answers in the order of the prompts."""
    found = {
        i: a for share, answers in zip(shares, made, strict=True) for i, a in zip(share, answers, strict=True)
    }
    return [found[i] for i in range(len(found))]


def packed_weights(model: GPT) -> bytes:
    """The parameters as a safetensors file's bytes."""
    return safetensors.torch.save(
        {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    )


def unpacked(data: bytes, config: dict[str, Any]) -> GPT:
    """The model of `packed_weights` and its config."""
    model = GPT(parse(GPTConfig, config, "a rollout worker's model"))
    found = safetensors.torch.load(data)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found[name])
    return model.eval()


_loaded: dict[str, Decoder] = {}  # of a worker: the weights it answered with last


def _work(
    path: str, config: dict[str, Any], prompts: list[list[int]], seeds: list[int], how: Drawing
) -> list[Answer]:
    if path not in _loaded:
        _loaded.clear()
        _loaded[path] = Decoder(unpacked(Path(path).read_bytes(), config))
    return draw(_loaded[path], prompts, seeds, how)


# -- further away ------------------------------------------------------------------------------------------


class RayRollouts:
    """Ray actors, on this machine or a cluster (``address`` as `ray.init` takes it; None: started here).

    Needs the extra ``[scale]``. Actors reserve ``cpus`` and ``gpus`` each.
    """

    def __init__(self, workers: int, *, address: str | None = None, cpus: float = 1, gpus: float = 0):
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "rollouts on Ray need the package ray, which is not installed: pip install "
                "'glasshouse[scale]', or use local worker processes"
            ) from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor)
        self._actors = [remote.remote() for _ in range(workers)]
        self._digest = ""
        self._weights: Any = None

    def sample(
        self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
    ) -> list[Answer]:
        """As `LocalWorkers.sample`; weights go through Ray's object store, once per change."""
        if (digest := weights_digest(model)) != self._digest:
            self._digest, self._weights = digest, self._ray.put(packed_weights(model))
        config = model.config.model_dump(mode="json")
        shares = dealt(prompts, len(self._actors))
        jobs = [
            actor.work.remote(
                self._digest, self._weights, config, [list(prompts[i]) for i in s], [seeds[i] for i in s], how
            )
            for actor, s in zip(self._actors, shares, strict=False)
        ]
        return gathered(shares, self._ray.get(jobs))

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Actor:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.digest = ""
        self.decoder: Decoder | None = None

    def work(
        self,
        digest: str,
        weights: bytes,
        config: dict[str, Any],
        prompts: list[list[int]],
        seeds: list[int],
        how: Drawing,
    ) -> list[Answer]:
        if digest != self.digest or self.decoder is None:
            self.digest, self.decoder = digest, Decoder(unpacked(weights, config))
        return draw(self.decoder, prompts, seeds, how)


class EngineRollouts:
    """A served engine (any OpenAI-compatible one) that is given the policy's weights before it answers.

    ``publish(model)`` brings the current weights to the server (write a checkpoint and have it reloaded);
    without that, samples would not be the policy's, so it is required. ``messages(ids)`` turns a prompt back
    into messages, ``encode(text)`` an answer into ids; ``end``: the token put behind it. An engine gives
    text: log-probabilities are computed here, and whether the limit cut an answer is told by its length.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        publish: Callable[[GPT], None],
        messages: Callable[[Sequence[int]], Any],
        encode: Callable[[str], list[int]],
        end: int,
    ):
        self.engine, self.publish, self.messages = engine, publish, messages
        self.encode, self.end = encode, end
        self._digest = ""

    def sample(
        self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing
    ) -> list[Answer]:
        """How well seeds are kept is the server's affair: a killed run may go on from other answers."""
        if (digest := weights_digest(model)) != self._digest:
            self.publish(model)
            self._digest = digest
        asked = [self.messages(prompt) for prompt in prompts]
        texts = self.engine.write(asked, how.max_new_tokens, 1.0, list(seeds))
        return [self._answer(text, how.max_new_tokens) for text in texts]

    def _answer(self, text: str, limit: int) -> Answer:
        if isinstance(text, Unreadable):  # the policy said something, and nobody knows what
            return Answer([], False)
        ids = self.encode(text)[:limit]
        ended = len(ids) < limit
        return Answer([*ids, self.end] if ended else ids, ended)

    def close(self) -> None:
        """The engine belongs to whoever gave it."""
