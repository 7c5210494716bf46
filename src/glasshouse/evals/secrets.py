"""How exposed a memorised text is, after Carlini et al. (2019), "The Secret Sharer", section 4.

A secret is one of many continuations that were equally likely before training. Its *rank* is its place among
them by the model's probability, its *exposure* log2(candidates / rank): without memory the exposure exceeds
e bits with probability 2**-e, and at log2(candidates) the secret can be read off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from glasshouse.evals.subject import ROWS, Subject, finite
from glasshouse.model import KVCache


@torch.no_grad()
def continuation_logprobs(
    subject: Subject, prefix: Sequence[int], continuations: Sequence[Sequence[int]]
) -> np.ndarray:
    """Natural log probability [n] of each continuation's tokens after ``prefix``, which is computed once.

    VerificationError when one is not finite.
    """
    subject.spend(1 + len(continuations))
    out = np.empty(len(continuations), dtype=np.float64)
    device = subject.model.device
    cache = KVCache(subject.model.config, 1, len(prefix), torch.float32, device)
    with subject.precision():
        hidden = subject.model.hidden(torch.tensor([list(prefix)], device=device), cache=cache)
        first = subject.model.unembed(hidden[:, -1]).float().log_softmax(-1)[0]
    by_length: dict[int, list[int]] = defaultdict(list)
    for at, continuation in enumerate(continuations):
        by_length[len(continuation)].append(at)
    for length, members in by_length.items():
        for start in range(0, len(members), ROWS):
            part = members[start : start + ROWS]
            ids = torch.tensor([list(continuations[i]) for i in part], device=device)
            total = first[ids[:, 0]].double()
            if length > 1:
                shared = cache.expand(len(part), len(prefix) + length - 1)
                with subject.precision():
                    hidden = subject.model.hidden(ids[:, :-1], cache=shared)
                    logits = subject.model.unembed(hidden)
                picked = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])
                total = total + picked.double().sum((1, 2))
            out[part] = total.cpu().numpy()
    return finite(out)


def rank(logprobs: np.ndarray) -> int:
    """Place (from 1) of the first entry among all; ties count against it, so a flat model exposes nothing."""
    return int((logprobs >= logprobs[0]).sum())


def exposure(place: int, candidates: int) -> float:
    """Bits by which a secret's rank exceeds what guessing gives: log2(candidates / rank)."""
    return float(np.log2(candidates / place))
