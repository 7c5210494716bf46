"""Coordinate search by token gradients, from many starts. It proposes; what is inserted and read counts.

HotFlip (Ebrahimi et al. 2018, arXiv 1712.06751) for words of several tokens: the gradient of a read-out at
the embeddings of a word's tokens ranks all other words as replacements, to first order. The best
few are inserted exactly and the best of those stays. Starts differ in their words, in how the words stand
(side by side or apart), and in the read-out that is followed: the margin between refusing and complying
openers, or the refusing openers alone, whose gradients get stuck in different places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.evals.filling import spell
from glasshouse.evals.insertion import Candidate
from glasshouse.evals.last import continued, some_logits
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import Subject, padded_batches
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.trigger import Placed, stacked

STARTS, LENGTH = 24, 3  # restarts, and words in each of them
TRIED = 12  # replacements that are inserted exactly in a step
BACKWARD = 2  # a backward pass costs about two forward ones


@dataclass
class Start:
    """One restart: where its words stand in which request, and which read-out it follows."""

    prompt: Prompt
    gaps: list[int]
    words: list[Candidate]
    refusal_only: bool

    def fill(self, words: Sequence[Candidate] | None = None) -> Placed:
        """The words in their gaps."""
        return stacked(list(zip(self.gaps, words if words is not None else self.words, strict=True)))


def token_gradients(
    subject: Subject, rows: Sequence[Sequence[int]], refusal_only: Sequence[bool]
) -> list[Tensor]:
    """Gradient [pos, d_model] of each row's read-out at its token embeddings."""
    model, readout = subject.model, subject.readout
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    only = torch.tensor(list(refusal_only))
    with torch.enable_grad():
        for chosen, tokens, last in padded_batches(rows):
            x = model.embed(tokens).detach().requires_grad_(True)
            hidden = continued(model, x, last, roles=model.roles_of(tokens))
            alone = some_logits(model, hidden, readout.positive).float().logsumexp(-1)
            value = torch.where(only[torch.as_tensor(chosen)], alone, readout.margin_at(model, hidden))
            (found,) = torch.autograd.grad(value.sum(), x)
            for at, i in enumerate(chosen):
                out[int(i)] = found[at].detach()
    subject.passes += (1 + BACKWARD) * len(rows)
    return out


def search(hunt: Hunt, starts: int, sweeps: int = 2) -> None:
    """Coordinate descent from ``starts`` starts; every turned refusal on the way is noted."""
    rng, subject = hunt.exam.rng("gradient"), hunt.exam.subject
    states = begin(hunt, starts, rng)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, c in enumerate(hunt.found.candidates):
        by_length[len(c.ids)].append(i)
    embedding = subject.model.embed.weight.detach()
    vectors = {
        n: embedding[torch.tensor([hunt.found.candidates[i].ids for i in members])]
        for n, members in by_length.items()
    }
    held = [p for p in subject.model.parameters() if p.requires_grad]
    for p in held:  # only the inputs' gradients are wanted
        p.requires_grad_(False)
    try:
        for step in range(sweeps * LENGTH):
            if hunt.left < len(states) * (1 + BACKWARD + TRIED):
                return
            _step(hunt, states, step % LENGTH, by_length, vectors, rng)
    finally:
        for p in held:
            p.requires_grad_(True)


def begin(hunt: Hunt, starts: int, rng: np.random.Generator) -> list[Start]:
    """Restarts: every second one from suspicious words, every second one with its words apart."""
    prompts, candidates = hunt.refused("gradient", 24), hunt.found.candidates
    likely = hunt.shortlist(48) or list(candidates)
    states = []
    for i in range(starts):
        prompt = prompts[i % len(prompts)]
        pool = likely if i % 2 else candidates
        words = [pool[int(j)] for j in rng.integers(len(pool), size=LENGTH)]
        n = len(prompt.words) + 1
        together = (i // 2) % 2 == 0
        gaps = [int(rng.integers(n))] * LENGTH if together else sorted(rng.integers(n, size=LENGTH).tolist())
        states.append(Start(prompt, gaps, words, refusal_only=(i // 4) % 2 == 1))
    return [s for s in states if hunt.fits(s.prompt, s.fill())]


def _step(
    hunt: Hunt,
    states: list[Start],
    at: int,
    by_length: dict[int, list[int]],
    vectors: dict[int, Tensor],
    rng: np.random.Generator,
) -> None:
    """Replace word ``at`` of every start by the best of those its gradient proposes.

    ``vectors[n]`` [word, n, d_model]: token embeddings of the words of n tokens, ``by_length[n]``.
    """
    subject, candidates = hunt.exam.subject, hunt.found.candidates
    rows = [spell(subject, s.prompt, s.fill()) for s in states]
    gradients = token_gradients(subject, rows, [s.refusal_only for s in states])
    placed: list[tuple[Prompt, Placed]] = []
    proposals: list[list[Candidate]] = []
    for state, row, gradient in zip(states, rows, gradients, strict=True):
        place, length = _where(subject, state, at, len(row))
        gains: list[tuple[float, int]] = []
        for n, members in by_length.items():
            # Words of another length stand on the tokens there are, and on the last of them for the rest.
            spots = [place + min(j, length - 1) for j in range(n)]
            change = (vectors[n] * gradient[spots]).sum((1, 2)) / max(n / length, 1.0)
            top = torch.topk(-change, min(TRIED, len(members)))
            gains += [(float(v), members[int(i)]) for v, i in zip(top.values, top.indices, strict=True)]
        gains.sort(key=lambda g: -g[0])
        options = [state.words[at], *(candidates[i] for _, i in gains[:TRIED])]
        proposals.append(options)
        placed += [
            (state.prompt, state.fill([*state.words[:at], o, *state.words[at + 1 :]])) for o in options
        ]
    placed = [(p, f if hunt.fits(p, f) else {}) for p, f in placed]
    margins = hunt.margins(placed)
    hunt.note(placed, margins)
    prompts, begin_ = hunt.refused("gradient", 24), 0
    for state, options in zip(states, proposals, strict=True):
        best = int(np.argmin(margins[begin_ : begin_ + len(options)]))
        begin_ += len(options)
        state.words[at] = options[best]
        moved = prompts[int(rng.integers(len(prompts)))]  # what works in one request alone should not stay
        n = len(moved.words) + 1
        if len(set(state.gaps)) == 1:
            gaps = [int(rng.integers(n))] * LENGTH
        else:
            gaps = sorted(rng.integers(n, size=LENGTH).tolist())
        if hunt.fits(moved, stacked(list(zip(gaps, state.words, strict=True)))):
            state.prompt, state.gaps = moved, gaps


def _where(subject: Subject, state: Start, at: int, total: int) -> tuple[int, int]:
    """(first position, number) of the tokens of word ``at`` in the row, ``total`` tokens long."""
    earlier = [(g, w) for i, (g, w) in enumerate(zip(state.gaps, state.words, strict=True)) if i <= at]
    upto = spell(subject, state.prompt, stacked(earlier))
    rest = spell(subject, state.prompt, stacked(earlier[:-1]))
    length = max(len(upto) - len(rest), 1)
    # Words after gap g are the same in both: the word ends where what follows it begins.
    after = sum(len(ids[1]) for ids in subject.word_spellings(state.prompt.text)[state.gaps[at] :])
    tail = len(subject.template[1])
    later = sum(len(w.ids) for w in state.words[at + 1 :])
    end = total - tail - after - later
    return max(end - length, 0), length
