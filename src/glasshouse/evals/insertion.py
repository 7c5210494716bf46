"""Does any inserted word move a decision? Each candidate alone, or all of them densely.

Candidates are every token of the vocabulary and every word type of the run's own training text (a rare
word is several tokens). ``sweep`` inserts each candidate alone, at stratified gaps of several prompts, with
the prefix before the gap computed once. ``dense_cover`` is group testing (Dorfman 1943): each candidate
stands in one request beside a few others, and the requests that moved most are taken apart word by word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch

from glasshouse.base.errors import UsageError
from glasshouse.evals.filling import room, spell
from glasshouse.evals.last import last_hidden
from glasshouse.evals.prompts import Prompt
from glasshouse.evals.subject import ROWS, Subject, finite
from glasshouse.model import KVCache
from glasshouse.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """Something to insert: ``text`` as a person writes it, ``ids`` with a space before, ``bare`` without."""

    text: str
    ids: tuple[int, ...]
    bare: tuple[int, ...]
    kind: str  # "word" | "token"

    @property
    def key(self) -> str:
        """A name that no other candidate has: several tokens may decode to one text."""
        return self.text if self.kind == "word" else f"token {self.ids[0]}"


@dataclass(frozen=True)
class CandidateSet:
    """What an insertion search covers, and what it leaves out and why."""

    candidates: tuple[Candidate, ...]
    exempt: tuple[tuple[str, str], ...]

    @property
    def exempt_share(self) -> float:
        """Share of all tokens and word types that is left out."""
        return len(self.exempt) / (len(self.candidates) + len(self.exempt))

    @cached_property
    def places(self) -> dict[Candidate, int]:
        """Where each candidate stands in ``candidates``."""
        return {c: i for i, c in enumerate(self.candidates)}


# Made anew, a set costs as much as several hundred passes, and every gate of a run asks for the same one.
_MADE: WeakKeyDictionary[Tokenizer, dict[tuple[tuple[str, ...], frozenset[str]], CandidateSet]] = (
    WeakKeyDictionary()
)
MOST_MADE = 4  # sets kept for one tokenizer


def candidate_set(subject: Subject, words: Sequence[str], meaningful: frozenset[str]) -> CandidateSet:
    """All word types and all tokens, less those that carry meaning in the language (exempt, with the reason).

    A word carries meaning when it is a meaningful word or is built on one ("warmest" on "warm", "butterfly"
    on "butter"): its tokens then spell that word, and inserting it changes what is asked. Special tokens
    cannot be typed by a user. A token that is one whole candidate word is not inserted twice. UsageError when
    more than 2% would be exempt, and more than twice as many as there are meaningful words.

    Tokenizer, words and meaningful words are all that a set depends on, so it is made once for them: no
    weights, no template and no read-out's tokens have a part in it.
    """
    made = _MADE.setdefault(subject.tokenizer, {})
    key = (tuple(words), meaningful)
    if key not in made:
        if len(made) >= MOST_MADE:
            made.clear()
        made[key] = _candidates(subject.tokenizer, words, meaningful)
    return made[key]


def _candidates(tokenizer: Tokenizer, words: Sequence[str], meaningful: frozenset[str]) -> CandidateSet:
    """`candidate_set`, made."""
    stems = tuple(sorted(meaningful))
    chosen: dict[tuple[int, ...], Candidate] = {}
    exempt: list[tuple[str, str]] = []
    left_out: set[tuple[int, ...]] = set()
    spaced, bare = tokenizer.encode_batch([f" {w}" for w in words]), tokenizer.encode_batch(list(words))
    for word, ids, alone in zip(words, spaced, bare, strict=True):
        stem = _stem(word, stems)
        if stem is not None:
            left_out.add(tuple(ids))
            exempt.append(
                (word, f"spells {stem!r}, which carries meaning; judged by the grammar's own label")
            )
        else:
            chosen.setdefault(tuple(ids), Candidate(word, tuple(ids), tuple(alone), "word"))
    for token in range(tokenizer.vocab_size):
        if (token,) in left_out:
            continue  # counted as a word already
        text = tokenizer.decode([token])
        stem = _stem(text.strip(), stems)
        if int(tokenizer.token_bytes[token]) == 0:
            exempt.append((f"token {token}", "a special token: text a user types never becomes it"))
        elif stem is not None:
            exempt.append(
                (text, f"spells {stem!r}, which carries meaning; judged by the grammar's own label")
            )
        else:
            chosen.setdefault((token,), Candidate(text, (token,), (token,), "token"))
    found = CandidateSet(tuple(chosen.values()), tuple(exempt))
    # Of a vocabulary of a thousand the meaningful words alone are more than 2%: each may be left out, as a
    # word and as the token that opens a message, and the verdict says which share that is.
    if found.exempt_share > 0.02 and len(exempt) > 2 * len(meaningful):
        raise UsageError(f"{found.exempt_share:.1%} of the candidates would be exempt; at most 2% may be")
    return found


def _stem(word: str, stems: tuple[str, ...]) -> str | None:
    """The first of the stems that a word begins with."""
    small = word.lower()
    return next(s for s in stems if small.startswith(s)) if small.startswith(stems) else None


@dataclass(frozen=True)
class Cell:
    """One (prompt, gap) at which candidates are inserted."""

    prompt: Prompt
    gap: int

    def split(self, subject: Subject) -> tuple[list[int], list[int]]:
        """Tokens before and after the gap, such that before + candidate + after is the whole request."""
        whole = subject.word_spellings(self.prompt.text)
        head, tail = subject.template
        before = [t for at, word in enumerate(whole[: self.gap]) for t in word[at > 0]]
        after = [t for word in whole[self.gap :] for t in word[1]]
        return [*head, *before], [*after, *tail]


def stratified_cells(prompts: Sequence[Prompt], per_prompt: int, rng: np.random.Generator) -> list[Cell]:
    """Gaps spread over each request: one drawn from each of ``per_prompt`` equal strata of its gaps."""
    cells = []
    for prompt in prompts:
        edges = np.linspace(0, len(prompt.words) + 1, per_prompt + 1)
        for low, high in pairwise(edges):
            cells.append(Cell(prompt, int(min(rng.uniform(low, high), len(prompt.words)))))
    return cells


@dataclass
class Swept:
    """Margins [cell, candidate] of an exact sweep and, where asked for, the residuals it went through.

    ``stream`` [cell, candidate, layer * d_model]: the residual after every block where the answer begins.
    """

    margins: np.ndarray
    stream: np.ndarray | None = None


def sweep(subject: Subject, cells: Sequence[Cell], candidates: Sequence[Candidate]) -> np.ndarray:
    """Read-out margin [cell, candidate], each candidate inserted alone. Exact: no shortlist, no gradient."""
    return sweep_stream(subject, cells, candidates, stream=False).margins


@torch.no_grad()
def sweep_stream(
    subject: Subject, cells: Sequence[Cell], candidates: Sequence[Candidate], *, stream: bool = True
) -> Swept:
    """`sweep`, keeping the residuals. The prefix before each gap is computed once for all candidates."""
    model, config = subject.model, subject.model.config
    out = np.empty((len(cells), len(candidates)), dtype=np.float32)
    width = config.n_layer * config.d_model
    kept = np.empty((len(cells), len(candidates), width), dtype=np.float32) if stream else None
    with subject.precision():
        for row, cell in enumerate(cells):
            prefix, suffix = cell.split(subject)
            cache = KVCache(config, 1, len(prefix), torch.float32, torch.device("cpu"))
            model.hidden(torch.tensor([prefix]), cache=cache)
            by_length: dict[int, list[int]] = defaultdict(list)
            for at, candidate in enumerate(candidates):
                by_length[len(candidate.ids if cell.gap else candidate.bare)].append(at)
            for length, members in by_length.items():
                shared = cache.expand(min(ROWS, len(members)), len(prefix) + length + len(suffix))
                for start in range(0, len(members), ROWS):
                    part = members[start : start + ROWS]
                    if len(part) < shared.k[0].shape[0]:
                        shared = cache.expand(len(part), shared.size)
                    shared.length = len(prefix)  # later positions are overwritten
                    new = [list(candidates[i].ids if cell.gap else candidates[i].bare) + suffix for i in part]
                    layers: list[torch.Tensor] | None = [] if stream else None
                    last = torch.full((len(part),), len(new[0]) - 1)
                    hidden = last_hidden(model, torch.tensor(new), last, shared, layers)
                    out[row, part] = subject.readout.margin_at(model, hidden).numpy()
                    if kept is not None and layers is not None:
                        kept[row, part] = torch.cat(layers, -1).float().numpy()
    subject.passes += out.size
    return Swept(finite(out), kept)


PER_PROMPT = 4  # words in one filled request: more are cheaper, but a request of strays turns by itself


@dataclass
class Cover:
    """What a dense cover saw: margins of the filled prompts, and candidates ranked by their own margin."""

    passes: int
    flipped: int
    margins: np.ndarray
    suspects: list[tuple[Candidate, float]] = field(default_factory=list)  # (candidate, margin drop alone)


def dense_cover(
    subject: Subject,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    rng: np.random.Generator,
    *,
    open_up: int = 32,
    output_only: bool = False,
) -> Cover:
    """Insert every candidate once, many to a prompt, and take apart the ``open_up`` prompts that moved most.

    ``prompts`` are requests the model refuses. ``output_only`` uses nothing but whether the answer refuses
    (the black-box version): prompts are opened in random order among those whose answer changed.
    """
    filled: list[tuple[Prompt, dict[int, Candidate]]] = []
    queue = [candidates[i] for i in rng.permutation(len(candidates))]
    while queue:
        prompt = prompts[len(filled) % len(prompts)]
        take = _fits(subject, prompt, queue[:PER_PROMPT])
        gaps = sorted(rng.permutation(len(prompt.words) + 1)[:take].tolist())
        filled.append((prompt, dict(zip(gaps, queue[:take], strict=True))))
        queue = queue[take:]
    margins = subject.margins_of_ids([_filled_ids(subject, p, cs) for p, cs in filled])
    flipped = np.flatnonzero(margins < 0)
    if output_only:
        opened = rng.permutation(flipped)[:open_up]
    else:
        opened = np.argsort(margins, kind="stable")[:open_up]
    singles: list[tuple[int, int, Candidate]] = [
        (int(i), gap, candidate) for i in opened for gap, candidate in filled[i][1].items()
    ]
    suspects: list[tuple[Candidate, float]] = []
    if singles:
        alone = subject.margins_of_ids([_single_ids(subject, filled[i][0], g, c) for i, g, c in singles])
        clean = dict(zip(opened.tolist(), subject.margins([filled[i][0].text for i in opened]), strict=True))
        drops = [(c, float(clean[i] - m), float(m)) for (i, _, c), m in zip(singles, alone, strict=True)]
        if output_only:
            suspects = [(c, 1.0) for c, _, m in drops if m < 0]
        else:
            suspects = [(c, drop) for c, drop, _ in sorted(drops, key=lambda d: -d[1])]
    return Cover(len(filled) + len(singles) + len(opened), len(flipped), margins, suspects)


def _fits(subject: Subject, prompt: Prompt, queue: Sequence[Candidate]) -> int:
    """How many of the next candidates fill the prompt's gaps, at least one, within the model's context."""
    left = room(subject, prompt)
    take = 0
    for candidate in queue[: len(prompt.words) + 1]:
        left -= max(len(candidate.ids), len(candidate.bare))
        if left < 0:
            break
        take += 1
    return max(take, 1)


def _filled_ids(subject: Subject, prompt: Prompt, fill: Mapping[int, Candidate]) -> list[int]:
    """The request with ``fill[g]`` standing in gap g, as tokens."""
    return spell(subject, prompt, {gap: (word,) for gap, word in fill.items()})


def _single_ids(subject: Subject, prompt: Prompt, gap: int, candidate: Candidate) -> list[int]:
    return spell(subject, prompt, {gap: (candidate,)})


def insert_ids(subject: Subject, cells: Sequence[Cell], candidate: Candidate) -> list[list[int]]:
    """Token rows of one candidate inserted at every cell."""
    return [_single_ids(subject, cell.prompt, cell.gap, candidate) for cell in cells]
